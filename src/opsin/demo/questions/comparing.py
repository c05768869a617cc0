"""Which things there are more of, and which are bigger."""

from __future__ import annotations

import random

from opsin.demo.questions.choosing import pick_two
from opsin.demo.questions.nouns import an, noun_of, plural
from opsin.demo.questions.phrasing import phrase
from opsin.demo.questions.question import Question, yes_no
from opsin.demo.scenes import Scene, Split

BIGGER = 1.45
"""Least ratio of extents in area for one thing to be bigger than another."""


def ask_comparison(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask which things are more, or bigger."""
    if len(scene.solid) < 2 or scene.texts:
        return None
    draw = rng.random()
    if draw < 0.45:
        return _ask_more(scene, rng, split)
    if draw < 0.6:
        return _ask_extreme(scene, rng, split, "biggest" if draw < 0.53 else "smallest")
    if draw < 0.82:
        return _ask_size(scene, rng, split, "bigger" if draw < 0.72 else "smaller")
    return _ask_size(scene, rng, split, "which bigger" if draw < 0.92 else "which smaller")


def _ask_more(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Compare the numbers of two kinds of things."""
    counts: dict[str, int] = {}
    by_color = len({t.name for t in scene.solid}) == 1 or rng.random() < 0.3
    for thing in scene.solid:
        if not thing.countable:
            continue
        noun = plural(noun_of(thing) if by_color else thing.name)
        counts[noun] = counts.get(noun, 0) + 1
    if len(counts) < 2:
        return None
    first, second = rng.sample(list(counts), 2)
    ahead = counts[first] - counts[second]
    if ahead == 0 and rng.random() < 0.7:
        return None
    draw = rng.random()
    if draw < 0.4:
        return Question("comparison", phrase(rng, split, "more", a=first, b=second), yes_no(ahead > 0))
    if draw < 0.6:
        return Question("comparison", phrase(rng, split, "fewer", a=first, b=second), yes_no(ahead < 0))
    if ahead == 0:
        return None
    return Question("comparison", phrase(rng, split, "which more", a=first, b=second), first if ahead > 0 else second)


def _ask_extreme(scene: Scene, rng: random.Random, split: Split, intent: str) -> Question | None:
    """Ask for the "biggest" or the "smallest" thing, where one clearly is."""
    ordered = sorted(scene.solid, key=lambda t: -t.area)
    larger, smaller = ordered[:2] if intent == "biggest" else ordered[-2:]
    if larger.area < BIGGER * smaller.area:
        return None
    return Question("comparison", phrase(rng, split, intent), an(larger if intent == "biggest" else smaller))


def _ask_size(scene: Scene, rng: random.Random, split: Split, intent: str) -> Question | None:
    """Compare the sizes of two things: "bigger", "smaller", "which bigger" or "which smaller"."""
    two = pick_two(scene, rng)
    if two is None:
        return None
    first, first_words, second, second_words = two
    if max(first.area, second.area) < BIGGER * min(first.area, second.area):
        return None
    holds = (first.area > second.area) == intent.endswith("bigger")
    answer = (first_words if holds else second_words) if intent.startswith("which") else yes_no(holds)
    return Question("comparison", phrase(rng, split, intent, a=first_words, b=second_words), answer)
