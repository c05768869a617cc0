"""What a thing is: its name, category, shape and colour, and the background's colour."""

from __future__ import annotations

import random

from opsin.demo.questions.choosing import pick
from opsin.demo.questions.nouns import CATEGORY_NOUNS, an, has_clear_categories, with_article
from opsin.demo.questions.phrasing import phrase
from opsin.demo.questions.question import Question
from opsin.demo.scenes import Scene, Split


def ask_what(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask what the only thing in the picture is."""
    things = scene.solid
    if len(scene.things) != 1 or not things:
        return None
    return Question("name", phrase(rng, split, "what is this"), an(things[0]))


def ask_category(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask which animal is there, or what kind of thing one is."""
    picked = pick(scene, rng, [t for t in scene.pictograms if t.category in CATEGORY_NOUNS])
    if picked is None:
        return None
    thing, words = picked
    noun = CATEGORY_NOUNS[thing.category or ""]
    if rng.random() < 0.35:
        return Question("category", phrase(rng, split, "category", t=words), with_article(noun))
    if {t.name for t in scene.pictograms if t.category == thing.category} != {thing.name}:
        return None
    if not has_clear_categories(scene):
        return None
    return Question("category", phrase(rng, split, "which of category", c=noun), an(thing))


def ask_shape(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for the shape of the thing of some colour."""
    shapes = scene.shapes
    if len(shapes) == 1 and len(scene.things) == 1 and rng.random() < 0.7:
        return Question("shape", phrase(rng, split, "only shape"), shapes[0].name)
    shapes = [s for s in shapes if sum(t.color == s.color for t in shapes) == 1]
    if not shapes or scene.texts:
        return None
    thing = rng.choice(shapes)
    return Question("shape", phrase(rng, split, "shape", c=thing.color or ""), thing.name)


def ask_color(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for the colour of a shape or of the print."""
    picked = pick(scene, rng, [t for t in scene.things if t.kind in ("shape", "text")], hide_color=True)
    if picked is None:
        return None
    thing, words = picked
    return Question("color", phrase(rng, split, "color", t=words), thing.color or "")


def ask_background(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for the colour of a plain background."""
    if scene.background.color is None:
        return None
    return Question("background", phrase(rng, split, "background"), scene.background.color)
