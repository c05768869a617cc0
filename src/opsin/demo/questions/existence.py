"""Whether something is there, and questions about things that are not."""

from __future__ import annotations

import random

from opsin.demo.questions.choosing import absent_noun
from opsin.demo.questions.nouns import CATEGORY_NOUNS, has_clear_categories, noun_of, plural, with_article
from opsin.demo.questions.phrasing import phrase
from opsin.demo.questions.question import Question, yes_no
from opsin.demo.scenes import SHAPES, Scene, Split


def ask_exist(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask whether something is there."""
    if scene.recipe == "text":
        return _ask_says(scene, rng, split)
    draw = rng.random()
    there = bool(scene.solid) and rng.random() < 0.5
    if draw < 0.15 and has_clear_categories(scene) and scene.pictograms:
        return _ask_category_exists(scene, rng, split)
    if there:
        thing = rng.choice(scene.solid)
        if not thing.countable:
            return Question("exist", phrase(rng, split, "exist any", s=thing.name), "yes")
        noun = noun_of(thing) if thing.kind == "pictogram" or rng.random() < 0.7 else thing.name
        if thing.kind == "shape" and not scene.pictograms and not scene.texts and rng.random() < 0.15:
            noun = f"{thing.color} {rng.choice(('thing', 'shape'))}"
    else:
        noun = absent_noun(scene, rng)
        if noun is None:
            return None
    if draw < 0.75:
        return Question("exist", phrase(rng, split, "exist", a=with_article(noun)), yes_no(there))
    if draw < 0.9:
        return Question("exist", phrase(rng, split, "exist any", s=plural(noun)), yes_no(there))
    return Question("exist", phrase(rng, split, "not exist", n=noun), yes_no(not there))


def _ask_category_exists(scene: Scene, rng: random.Random, split: Split) -> Question:
    present = {t.category for t in scene.pictograms}
    category = rng.choice(tuple(CATEGORY_NOUNS))
    noun = CATEGORY_NOUNS[category]
    if rng.random() < 0.5:
        text = phrase(rng, split, "exist", a=with_article(noun))
    else:
        text = phrase(rng, split, "exist any", s=plural(noun))
    return Question("exist", text, yes_no(category in present))


def _ask_says(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask whether the print says some text: what it says, or that with a few characters swapped."""
    text = rng.choice(scene.texts).name
    if rng.random() < 0.5:
        return Question("exist", phrase(rng, split, "says", w=text), "yes")
    letters = list(text)
    for _ in range(rng.choice((1, 2, len(letters)))):
        position = rng.randrange(len(letters))
        pool = "0123456789" if letters[0].isdigit() else "abcdefghijklmnopqrstuvwxyz"
        swap = rng.choice(pool)
        letters[position] = swap.upper() if letters[position].isupper() else swap
    other = "".join(letters)
    if any(other == t.name for t in scene.texts):
        return None
    return Question("exist", phrase(rng, split, "says", w=other), "no")


def ask_absent(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask about a thing that is not there, as if it were."""
    noun = absent_noun(scene, rng)
    if noun is None or scene.recipe == "text":
        return None
    intent = "color" if noun in SHAPES and rng.random() < 0.6 else "position"
    return Question("absent", phrase(rng, split, intent, t=f"the {noun}"), f"There is no {noun}.")
