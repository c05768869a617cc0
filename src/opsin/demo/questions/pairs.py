"""Questions about two pictures, in the words of "the first" and "the second"."""

from __future__ import annotations

import random

from opsin.demo.questions.choosing import absent_noun
from opsin.demo.questions.counting import count_of, count_targets
from opsin.demo.questions.intents import INTENTS
from opsin.demo.questions.nouns import noun_of, with_article
from opsin.demo.questions.phrasing import PICTURE_WORDS, phrase
from opsin.demo.questions.question import Question, yes_no
from opsin.demo.scenes import RECIPES, Scene, Split, sample_scene
from opsin.demo.scenes.variants import changed, redrawn

Scenes = tuple[Scene, Scene]

_RECIPE_WEIGHTS = (30, 25, 8, 17, 10, 6, 4, 0)
_ORDINALS = ("first", "second")
_ABOUT_ONE = ("list", "count", "color", "exist", "position", "read", "name")
"""Intents that are also asked about one picture of two."""


def sample_pair(rng: random.Random, split: Split, kind: str | None = None) -> tuple[Scene, Scene, list[Question]]:
    """Draw two scenes and questions about both.

    Args:
        rng: the only source of chance.
        split: train or test.
        kind: one of the pair kinds, or None for all that these pictures bear.
    """
    scenes, same = _sample_scenes(rng, split)
    questions: list[Question | None] = []
    if kind in (None, "pair same"):
        questions.append(_ask_same(same, rng, split))
    if kind in (None, "pair more"):
        questions.append(_ask_more(scenes, rng, split))
    if kind in (None, "pair which"):
        questions.append(_ask_which(scenes, rng, split))
    asked = [question for question in questions if question is not None]
    if kind in (None, "pair ask"):
        for _ in range(6):
            question = _ask_one(scenes, rng, split)
            if question is not None:
                asked.append(question)
                if len(asked) >= 4:
                    break
    return *scenes, asked


def _sample_scenes(rng: random.Random, split: Split) -> tuple[Scenes, bool]:
    """Draw two scenes, equal, alike or unrelated, and say whether they show the same."""
    recipe = rng.choices(RECIPES, _RECIPE_WEIGHTS)[0]
    first = sample_scene(rng, split, recipe)
    relation = rng.random()
    if relation < 0.25:
        return (first, redrawn(first, rng)), True
    if relation < 0.55:
        variant = changed(first, rng, split)
        return (first, redrawn(variant, rng) if variant else sample_scene(rng, split, recipe)), False
    return (first, sample_scene(rng, split, recipe if rng.random() < 0.7 else None)), False


def _ask_same(same: bool, rng: random.Random, split: Split) -> Question:
    """Ask whether the two pictures show the same."""
    if rng.random() < 0.7:
        return Question("pair same", phrase(rng, split, "pair same"), yes_no(same))
    return Question("pair same", phrase(rng, split, "pair different"), yes_no(not same))


def _ask_more(scenes: Scenes, rng: random.Random, split: Split) -> Question | None:
    """Ask which picture has more of something."""
    if any(scene.texts for scene in scenes):
        return None
    nouns = [noun for scene in scenes for noun, _ in count_targets(scene, rng)]
    noun = rng.choice(nouns) if nouns else "things"
    first, second = (count_of(scene, noun) for scene in scenes)
    if first == second and rng.random() < 0.6:
        noun = "things"
        first, second = (count_of(scene, noun) for scene in scenes)
    if first is None or second is None or (first == second and rng.random() >= 0.35):
        return None
    answer = "the first" if first > second else "the second" if first < second else "the same number"
    return Question("pair more", phrase(rng, split, "pair more", s=noun), answer)


def _ask_which(scenes: Scenes, rng: random.Random, split: Split) -> Question | None:
    """Ask which picture has something, or whether both do."""
    countable = [thing for scene in scenes for thing in scene.solid if thing.countable]
    if not countable:
        return None
    thing = rng.choice(countable)
    noun = noun_of(thing)
    if thing.kind == "shape" and rng.random() < 0.3:
        noun = thing.name
    if rng.random() < 0.12:
        noun = absent_noun(scenes[0], rng) or noun
    first, second = (any(noun in (noun_of(t), t.name) for t in scene.solid) for scene in scenes)
    if rng.random() < 0.75:
        answer = "both" if first and second else "the first" if first else "the second" if second else "neither"
        return Question("pair which", phrase(rng, split, "pair which", a=with_article(noun)), answer)
    return Question("pair which", phrase(rng, split, "pair both", a=with_article(noun)), yes_no(first and second))


def _ask_one(scenes: Scenes, rng: random.Random, split: Split) -> Question | None:
    """Ask about one of the two pictures."""
    number = rng.randrange(2)
    question = INTENTS[rng.choice(_ABOUT_ONE)](scenes[number], rng, split)
    if question is None:
        return None
    return Question("pair ask", _about(question.question, _ORDINALS[number], rng), question.answer)


def _about(question: str, ordinal: str, rng: random.Random) -> str:
    """Turn a question about a picture into one about the first or the second."""
    for word in PICTURE_WORDS:
        for determiner in ("the", "this"):
            if f"{determiner} {word}" in question:
                return question.replace(f"{determiner} {word}", f"the {ordinal} {word}", 1)
    ending = question[-1] if question[-1] in "?." else "?"
    stem = question.rstrip("?.")
    if rng.random() < 0.5 and stem.count(". ") == 0:
        return f"In the {ordinal} picture: {question}"
    return f"{stem} in the {ordinal} picture{ending}"
