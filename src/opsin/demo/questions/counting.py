"""Numbers: how many things of a name, a colour or a category there are, and how many letters a word has."""

from __future__ import annotations

import random

from opsin.demo.questions.choosing import absent_noun
from opsin.demo.questions.nouns import CATEGORY_NOUNS, has_clear_categories, noun_of, plural
from opsin.demo.questions.phrasing import phrase
from opsin.demo.questions.question import Question
from opsin.demo.scenes import COLOR_NAMES, Scene, Split


def count_targets(scene: Scene, rng: random.Random) -> list[tuple[str, int]]:
    """Return plurals that can be counted here, with their numbers; some are absent on purpose."""
    shapes, pictograms = scene.shapes, scene.pictograms
    targets: list[tuple[str, int]] = []
    for thing in shapes:
        targets.append((plural(thing.name), sum(t.name == thing.name for t in shapes)))
        targets.append((plural(noun_of(thing)), sum(noun_of(t) == noun_of(thing) for t in shapes)))
        if not pictograms and not scene.texts:
            noun = rng.choice(("shapes", "things"))
            targets.append((f"{thing.color} {noun}", sum(t.color == thing.color for t in shapes)))
    if shapes:
        targets.append(("shapes", len(shapes)))
    for thing in pictograms:
        if thing.countable:
            targets.append((plural(thing.name), sum(t.name == thing.name for t in pictograms)))
        if thing.category in CATEGORY_NOUNS and has_clear_categories(scene):
            noun = plural(CATEGORY_NOUNS[thing.category])
            targets.append((noun, sum(t.category == thing.category for t in pictograms)))
    if not scene.texts:
        targets.append(("things", len(scene.things)))
        if not shapes or rng.random() < 0.3:
            targets.append(("objects", len(scene.things)))
    if rng.random() < 0.25:
        absent = absent_noun(scene, rng)
        targets.append((plural(absent), 0) if absent else ("things", len(scene.things)))
    return targets


def count_of(scene: Scene, noun: str) -> int | None:
    """Count what a plural of :func:`count_targets` names in any scene; None where that would be ambiguous."""
    if noun in ("things", "objects"):
        return len(scene.things)
    if noun == "shapes":
        return len(scene.shapes)
    for category, name in CATEGORY_NOUNS.items():
        if noun == plural(name):
            if not has_clear_categories(scene):
                return None
            return sum(t.category == category for t in scene.pictograms)
    color, _, rest = noun.partition(" ")
    if color in COLOR_NAMES and rest in ("things", "shapes"):
        return None if scene.pictograms else sum(t.color == color for t in scene.shapes)
    return sum(noun in (plural(t.name), plural(noun_of(t))) for t in scene.solid)


def ask_count(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for a number of things, or of letters."""
    if scene.recipe == "text":
        texts = scene.texts
        if len(texts) != 1 or scene.text_kind != "word" or rng.random() < 0.5:
            return None
        return Question("count", phrase(rng, split, "letters"), str(len(texts[0].name)))
    targets = count_targets(scene, rng)
    if not targets:
        return None
    noun, number = rng.choice(targets)
    if number <= 1 and rng.random() < 0.5:
        noun, number = max(rng.sample(targets, min(3, len(targets))), key=lambda target: target[1])
    return Question("count", phrase(rng, split, "count", s=noun), str(number))
