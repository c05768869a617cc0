"""From an intent to the words of a question."""

from __future__ import annotations

import random

from opsin.demo.questions.wordings import PHRASES
from opsin.demo.scenes import Split

PICTURE_WORDS = ("picture", "image", "photo", "drawing", "scene")
_PREFIXES = ("Please answer: ", "Look at the picture. ", "Hey, ", "Look at this. ", "Question: ", "Please tell me: ")
_SUFFIXES = (" Please.", " Thanks!", " Answer with one word.", " Answer briefly.", " Keep it short.")


def phrase(rng: random.Random, split: Split, intent: str, **slots: str) -> str:
    """Word a question.

    Training wordings also come with lower case, without their question mark, and within polite phrases.
    """
    training, held_out = PHRASES[intent]
    text = rng.choice(training if split == "train" else held_out)
    picture = rng.choices(PICTURE_WORDS, (55, 25, 7, 7, 6))[0]
    color = "color" if rng.random() < 0.6 else "colour"
    if "t" in slots:
        slots["T"] = slots["t"][0].upper() + slots["t"][1:]
    text = text.format(pic=picture, color=color, **slots)
    if split == "train":
        return decorate(rng, text, brief=intent not in ("list", "caption"))
    return text


def decorate(rng: random.Random, text: str, *, brief: bool = True) -> str:
    """Vary a training question's case, punctuation and surroundings; ``brief`` may ask for a short answer."""
    chance = rng.random()
    if chance < 0.05 and '"' not in text:
        text = text[0].lower() + text[1:].rstrip("?.")
    elif chance < 0.08 and '"' not in text:
        text = text.lower()
    elif chance < 0.11:
        text = text.rstrip("?.")
    elif chance < 0.15:
        prefix = rng.choice(_PREFIXES)
        text = prefix + (text[0].lower() + text[1:] if prefix.endswith(", ") else text)
    elif chance < 0.18:
        text += rng.choice(_SUFFIXES if brief else _SUFFIXES[:2])
    return text
