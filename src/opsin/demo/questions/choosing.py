"""What to ask about: things that words can single out, and things that are not there."""

from __future__ import annotations

import random

from opsin.demo import pack
from opsin.demo.questions.nouns import noun_of
from opsin.demo.scenes import COLOR_NAMES, SHAPES, Scene, Thing


def _definite(scene: Scene, thing: Thing, rng: random.Random, *, hide_color: bool = False) -> str | None:
    """Return words that single a thing out, or None where there are none."""
    options = []
    if thing.kind == "text":
        if len(scene.texts) > 1:
            return None
        text_kind = scene.text_kind
        return "the text" if text_kind == "letters" or rng.random() < 0.5 else f"the {text_kind}"
    if sum(t.name == thing.name for t in scene.solid) == 1:
        options.append(f"the {thing.name}")
    if thing.kind == "shape" and not hide_color:
        if sum(noun_of(t) == noun_of(thing) for t in scene.solid) == 1:
            options += [f"the {noun_of(thing)}"] * 2
        if sum(t.color == thing.color for t in scene.things) == 1 and not scene.pictograms:
            options.append(f"the {thing.color} {rng.choice(('thing', 'shape', 'one'))}")
    if not options and len(scene.shapes) == 1 and thing.kind == "shape":
        options.append("the shape")
    return rng.choice(options) if options else None


def pick(
    scene: Scene, rng: random.Random, things: list[Thing], *, hide_color: bool = False
) -> tuple[Thing, str] | None:
    """Choose a thing that words can single out, and such words; ``hide_color`` leaves its colour out of them."""
    things = list(things)
    rng.shuffle(things)
    for thing in things:
        words = _definite(scene, thing, rng, hide_color=hide_color)
        if words:
            return thing, words
    return None


def pick_two(scene: Scene, rng: random.Random) -> tuple[Thing, str, Thing, str] | None:
    """Choose two things that are not print, each with words that single it out."""
    things = scene.solid
    rng.shuffle(things)
    named = []
    for thing in things:
        words = _definite(scene, thing, rng)
        if words:
            named.append((thing, words))
        if len(named) == 2:
            return (*named[0], *named[1])
    return None


def absent_noun(scene: Scene, rng: random.Random) -> str | None:
    """Return a countable noun that nothing here answers to, close to what is here where possible."""
    shapes, pictograms = scene.shapes, scene.pictograms
    present = {noun_of(t) for t in scene.things} | {t.name for t in scene.solid}
    for _ in range(10):
        draw = rng.random()
        if shapes and (not pictograms or draw < 0.5):
            thing = rng.choice(shapes)
            if draw < 0.15:
                noun = rng.choice(SHAPES)
            elif draw < 0.3:
                noun = f"{thing.color} {rng.choice(SHAPES)}"
            elif draw < 0.4:
                noun = f"{rng.choice(COLOR_NAMES)} {thing.name}"
            else:
                # Right colour and right shape, of two different things.
                noun = f"{thing.color} {rng.choice(shapes).name}"
        elif pictograms and draw < 0.9:
            thing = rng.choice(pictograms)
            pool = pack.pictograms().things
            other = rng.choice([p for p in pool if p.category == thing.category] if draw < 0.6 else list(pool))
            if not other.countable:
                continue
            noun = other.name
        else:
            noun = rng.choice(SHAPES)
        if noun not in present:
            return noun
    return None
