"""A scene at random: its recipe, size, background, things and degradations."""

from __future__ import annotations

import math
import random

from opsin.demo import pack
from opsin.demo.scenes.backgrounds import sample_background
from opsin.demo.scenes.recipes import FILLINGS, Setting
from opsin.demo.scenes.scene import MOST_THINGS, RECIPES, Recipe, Scene, Split, TextKind

RECIPE_WEIGHTS = (24, 12, 6, 17, 14, 9, 22, 1)
"""How often training draws each of ``RECIPES``."""


def sample_scene(
    rng: random.Random,
    split: Split,
    recipe: Recipe | None = None,
    *,
    styles: tuple[str, ...] | None = None,
    text_kind: TextKind | None = None,
    only: str | None = None,
    weights: tuple[float, ...] = RECIPE_WEIGHTS,
) -> Scene:
    """Draw a scene at random.

    Args:
        rng: the only source of chance, so that one seed gives one scene.
        split: "test" uses what training never draws, in every scene that can hold it.
        recipe: the family of scene; None draws one.
        styles: icon sets to draw from; None takes the training ones.
        text_kind: the print of text scenes; None draws one.
        only: for the recipe "name", the pictogram to show; None draws one.
        weights: how often each of ``RECIPES`` is drawn.
    """
    recipe = recipe or rng.choices(RECIPES, weights)[0]
    aspect = 1.0 if rng.random() < 0.3 else math.exp(rng.uniform(math.log(0.75), math.log(4 / 3)))
    if recipe == "text":
        aspect = math.exp(rng.uniform(math.log(0.8), math.log(2.2)))
    side = rng.choices((rng.uniform(80, 128), rng.uniform(128, 224), rng.uniform(224, 384)), (20, 55, 25))[0]
    width, height = round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
    background = sample_background(rng, split, plain=recipe == "text")
    setting = Setting(
        rng=rng,
        split=split,
        aspect=width / height,
        background=background,
        styles=styles or pack.pictograms().training_styles,
        only=only,
        text_kind=text_kind,
    )
    things, drawn_kind = FILLINGS[recipe](setting)
    things = things[:MOST_THINGS]
    compressed = rng.random() >= 0.6
    return Scene(
        things=things,
        background=background,
        width=width,
        height=height,
        recipe=recipe,
        smooth=rng.random() < 0.6,
        jpeg_quality=rng.randint(35, 92) if compressed else 0,
        noise=0.0 if rng.random() < 0.6 else rng.uniform(2, 14),
        seed=rng.getrandbits(31),
        text_kind=drawn_kind if any(thing.kind == "text" for thing in things) else None,
    )
