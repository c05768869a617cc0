"""Where things are, which way they point, and how they lie to each other."""

from __future__ import annotations

import random

from opsin.demo.questions.choosing import pick, pick_two
from opsin.demo.questions.nouns import an
from opsin.demo.questions.phrasing import phrase
from opsin.demo.questions.places import PLACES, place_name, place_phrase
from opsin.demo.questions.question import Question, yes_no
from opsin.demo.scenes import Scene, Split, Thing

_RELATIONS = {
    "left": ("left of", "to the left of", "on the left side of", "on the left of"),
    "right": ("right of", "to the right of", "on the right side of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
_FURTHER = {
    "left": ("further left", "more to the left"),
    "right": ("further right", "more to the right"),
    "above": ("higher", "higher up"),
    "below": ("lower", "further down"),
}

CLEARLY = 0.1
"""Least distance of centres, as a fraction of the picture, for one thing to be left of or above another."""


def ask_position(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask where a thing is, or what is somewhere."""
    if scene.recipe == "text":
        return None
    if rng.random() < 0.65:
        picked = pick(scene, rng, scene.solid)
        if picked is None:
            return None
        thing, words = picked
        return Question("position", phrase(rng, split, "position", t=words), place_name(thing))
    if scene.texts:
        return None
    thing = rng.choice(scene.things) if scene.things and rng.random() < 0.85 else None
    place = place_name(thing) if thing else rng.choice(rng.choice(PLACES))
    there = [t for t in scene.things if place_name(t) == place]
    if len(there) > 1:
        return None
    if any(_reaches(t, place) for t in scene.things if t not in there):
        return None
    answer = an(there[0]) if there else "nothing"
    return Question("position", phrase(rng, split, "what is at", place=place_phrase(place)), answer)


def _reaches(thing: Thing, place: str) -> bool:
    """Say whether a thing centred elsewhere covers the middle of a place, which would make the place ambiguous."""
    for row, names in enumerate(PLACES):
        if place in names:
            x, y = (names.index(place) + 0.5) / 3, (row + 0.5) / 3
            return abs(x - thing.x) < thing.w / 2 + 0.06 and abs(y - thing.y) < thing.h / 2 + 0.06
    return False


def ask_direction(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask which way an arrow points."""
    picked = pick(scene, rng, [t for t in scene.shapes if t.direction])
    if picked is None:
        return None
    thing, words = picked
    return Question("direction", phrase(rng, split, "direction", t=words), thing.direction or "")


def _offset(first: Thing, second: Thing, side: str) -> float:
    """Return how far ``first`` lies to that side of ``second``, as a fraction of the picture."""
    return {
        "left": second.x - first.x,
        "right": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }[side]


def ask_relation(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask how two things lie to each other, or what lies to one side of a thing."""
    two = pick_two(scene, rng)
    if two is None:
        return None
    first, first_words, second, second_words = two
    side = rng.choice(tuple(_RELATIONS))
    offset = _offset(first, second, side)
    words = rng.choice(_RELATIONS[side])
    draw = rng.random()
    if draw < 0.3 and not scene.texts and words not in ("higher than", "lower than"):
        others = [t for t in scene.things if t is not second]
        offsets = [_offset(t, second, side) for t in others]
        hits = [t for t, o in zip(others, offsets, strict=True) if o >= CLEARLY]
        if len(hits) != 1 or any(0 <= o < CLEARLY for o in offsets):
            return None
        return Question("relation", phrase(rng, split, "what relation", rel=words, b=second_words), an(hits[0]))
    if abs(offset) < CLEARLY:
        return None
    if draw < 0.5:
        further = rng.choice(_FURTHER[side])
        text = phrase(rng, split, "which side", further=further, a=first_words, b=second_words)
        return Question("relation", text, first_words if offset > 0 else second_words)
    text = phrase(rng, split, "relation", rel=words, a=first_words, b=second_words)
    return Question("relation", text, yes_no(offset > 0))
