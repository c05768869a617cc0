"""Questions about scenes, and their answers.

Owns: the wordings (each with some that only the test uses), and what counts as the answer to each.
Refuses: drawing; see :mod:`opsin.demo.scenes`.

An answer may hold stretches between two ``SPELLED`` marks: printed text, which training spells letter by letter so that
reading never depends on how the tokenizer cuts a word. :func:`plain` removes the marks.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opsin.demo import pack
from opsin.demo.scenes import (
    COLOR_NAMES,
    RECIPES,
    SHAPES,
    Scene,
    Split,
    Thing,
    is_held_out_combination,
    make_pictogram,
    make_shape,
    sample_color,
    sample_scene,
    shade_for,
)

SPELLED = "\x00"

KINDS = (
    "name",
    "category",
    "shape",
    "color",
    "background",
    "count",
    "position",
    "direction",
    "relation",
    "comparison",
    "exist",
    "absent",
    "read word",
    "read number",
    "read letters",
    "list",
    "caption",
    "pair more",
    "pair which",
    "pair same",
    "pair ask",
    "chat",
)
"""Task kinds, in the order of the published table."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its true answer."""

    kind: str
    question: str
    answer: str


def plain(answer: str) -> str:
    """Return an answer as a reader sees it."""
    return answer.replace(SPELLED, "")


# Wordings: for each intent, those that training uses and those that only the test uses. -------------------------------

PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "what is this": (
        (
            "What is this?",
            "What's this?",
            "What is shown here?",
            "What is it?",
            "What do you see here?",
            "Name the thing in the {pic}.",
            "What thing is this?",
            "What is the thing in the {pic}?",
            "What does the {pic} show?",
            "Which thing is in the {pic}?",
            "Can you name this?",
            "Tell me what this is.",
        ),
        (
            "What is shown in the {pic}?",
            "What's shown here?",
            "Which thing do you see?",
            "Can you tell me what this is?",
        ),
    ),
    "list": (
        (
            "What is in the {pic}?",
            "What's in the {pic}?",
            "What do you see?",
            "What do you see in the {pic}?",
            "What can you see?",
            "Which things are in the {pic}?",
            "List the things in the {pic}.",
            "What things are there?",
            "What is there in the {pic}?",
            "Name everything in the {pic}.",
            "What are the things in the {pic}?",
        ),
        (
            "What can you see in the {pic}?",
            "Which things do you see?",
            "Name the things in the {pic}.",
            "List everything in the {pic}.",
        ),
    ),
    "caption": (
        (
            "Describe the {pic}.",
            "Describe what you see.",
            "Describe this {pic}.",
            "Write a caption for the {pic}.",
            "Give a description of the {pic}.",
            "What does the {pic} look like?",
            "Describe the {pic} in one sentence.",
            "Can you describe this?",
            "Write a description of this {pic}.",
            "Tell me everything about the {pic}.",
            "Describe everything you see in the {pic}.",
        ),
        (
            "Can you describe the {pic}?",
            "Give a caption for this {pic}.",
            "Describe what you see in the {pic}.",
            "Write a sentence about the {pic}.",
        ),
    ),
    "category": (
        (
            "What kind of thing is {t}?",
            "What sort of thing is {t}?",
            "{T} is what kind of thing?",
            "Tell me what kind of thing {t} is.",
            "Is {t} an animal, a fruit, a vehicle or what?",
        ),
        ("Which kind of thing is {t}?", "Can you tell me what sort of thing {t} is?"),
    ),
    "which of category": (
        (
            "Which {c} is in the {pic}?",
            "What {c} do you see?",
            "What {c} is this?",
            "Name the {c}.",
            "Which {c} can you see?",
            "What {c} is in the {pic}?",
            "What kind of {c} is in the {pic}?",
            "Tell me which {c} this is.",
        ),
        ("Which {c} do you see?", "What {c} is shown?", "Name the {c} in the {pic}.", "Which {c} is this?"),
    ),
    "shape": (
        (
            "What shape is the {c} thing?",
            "Which shape is {c}?",
            "What is the {c} shape?",
            "What is the shape of the {c} thing?",
            "What {c} shape is there?",
            "What kind of shape is the {c} one?",
            "Name the {c} shape.",
            "The {c} thing has what shape?",
            "What shape does the {c} thing have?",
            "Which {c} shape is in the {pic}?",
            "Tell me what shape the {c} thing is.",
        ),
        (
            "What shape is the {c} one?",
            "Which shape does the {c} thing have?",
            "Tell me the shape of the {c} thing.",
            "What kind of shape is the {c} thing?",
        ),
    ),
    "only shape": (
        (
            "What shape is this?",
            "What shape is in the {pic}?",
            "Which shape do you see?",
            "What shape is shown?",
            "Name the shape in the {pic}.",
            "What shape is it?",
            "Which shape is this?",
            "What kind of shape is this?",
            "Tell me the shape.",
        ),
        ("What shape do you see?", "Which shape is in the {pic}?", "Name this shape.", "Which shape is shown here?"),
    ),
    "color": (
        (
            "What {color} is {t}?",
            "Which {color} is {t}?",
            "What is the {color} of {t}?",
            "What {color} does {t} have?",
            "{T} is what {color}?",
            "Tell me the {color} of {t}.",
            "Name the {color} of {t}.",
            "What {color} is {t} in this {pic}?",
            "Tell me what {color} {t} is.",
            "What {color} do you see on {t}?",
        ),
        (
            "Which {color} does {t} have?",
            "What's the {color} of {t}?",
            "Can you tell me what {color} {t} is?",
            "{T} has what {color}?",
        ),
    ),
    "background": (
        (
            "What {color} is the background?",
            "Which {color} is the background?",
            "What is the {color} of the background?",
            "What is the background {color}?",
            "What {color} is behind everything?",
            "Tell me the background {color}.",
            "The background is what {color}?",
            "What is the {color} of the background in the {pic}?",
        ),
        (
            "Which {color} does the background have?",
            "What {color} is the background of the {pic}?",
            "Tell me the {color} of the background.",
        ),
    ),
    "count": (
        (
            "How many {s} are there?",
            "How many {s} are in the {pic}?",
            "How many {s} do you see?",
            "Count the {s}.",
            "What is the number of {s}?",
            "How many {s} can you see?",
            "Number of {s}?",
            "How many {s} does the {pic} show?",
            "How many {s}?",
            "Tell me the number of {s}.",
            "Count the {s} in the {pic}.",
            "How many {s} can you count?",
        ),
        (
            "Can you count the {s}?",
            "How many {s} are shown?",
            "Tell me how many {s} there are.",
            "What is the number of {s} in the {pic}?",
            "How many {s} do you see in the {pic}?",
        ),
    ),
    "letters": (
        (
            "How many letters does the word have?",
            "How many letters are in the word?",
            "Count the letters of the word.",
            "What is the number of letters in the word?",
        ),
        ("How many letters are there in the word?", "Can you count the letters in the word?"),
    ),
    "position": (
        (
            "Where is {t}?",
            "Where in the {pic} is {t}?",
            "In which part of the {pic} is {t}?",
            "What is the position of {t}?",
            "Where can I find {t}?",
            "Where do you see {t}?",
            "Which part of the {pic} has {t}?",
            "Where is {t} located?",
            "In what place is {t}?",
            "Tell me where {t} is.",
            "Where can you see {t} in the {pic}?",
        ),
        (
            "Where is {t} in the {pic}?",
            "Where is {t} located in the {pic}?",
            "In which place is {t}?",
            "Can you tell me where {t} is?",
        ),
    ),
    "what is at": (
        (
            "What is {place}?",
            "What is {place} of the {pic}?",
            "What do you see {place}?",
            "Which thing is {place}?",
            "What can you see {place}?",
            "Name the thing {place}.",
            "Tell me what is {place}.",
            "What's {place}?",
        ),
        ("What thing is {place}?", "What can you see {place} of the {pic}?", "What is there {place}?"),
    ),
    "direction": (
        (
            "Which way does {t} point?",
            "Which way is {t} pointing?",
            "In which direction does {t} point?",
            "What is the direction of {t}?",
            "Where does {t} point?",
            "What direction is {t} pointing in?",
            "Tell me which way {t} points.",
            "Where is {t} pointing?",
        ),
        (
            "What direction does {t} point?",
            "In which direction is {t} pointing?",
            "Tell me the direction of {t}.",
        ),
    ),
    "relation": (
        (
            "Is {a} {rel} {b}?",
            "Is {a} located {rel} {b}?",
            "Does {a} lie {rel} {b}?",
            "Can you see {a} {rel} {b}?",
            "Is {a} somewhere {rel} {b}?",
            "In the {pic}, is {a} {rel} {b}?",
            "Is it true that {a} is {rel} {b}?",
            "Tell me if {a} is {rel} {b}.",
        ),
        (
            "Is {a} {rel} {b} in the {pic}?",
            "Can you tell me if {a} is {rel} {b}?",
            "Is it true that {a} lies {rel} {b}?",
        ),
    ),
    "what relation": (
        (
            "What is {rel} {b}?",
            "Which thing is {rel} {b}?",
            "What do you see {rel} {b}?",
            "What can you see {rel} {b}?",
            "Name the thing {rel} {b}.",
            "Tell me what is {rel} {b}.",
            "What's {rel} {b}?",
        ),
        ("What thing is {rel} {b}?", "What is there {rel} {b}?", "What is {rel} {b} in the {pic}?"),
    ),
    "which side": (
        (
            "Which is {further}, {a} or {b}?",
            "Which one is {further}, {a} or {b}?",
            "What is {further}: {a} or {b}?",
            "Is {a} or {b} {further}?",
        ),
        ("Which thing is {further}, {a} or {b}?", "Tell me which is {further}, {a} or {b}."),
    ),
    "more": (
        (
            "Are there more {a} than {b}?",
            "Do you see more {a} than {b}?",
            "Does the {pic} show more {a} than {b}?",
            "Is the number of {a} larger than the number of {b}?",
            "Are there more {a} than {b} in the {pic}?",
            "Are more {a} than {b} there?",
        ),
        (
            "Can you see more {a} than {b}?",
            "Does the {pic} have more {a} than {b}?",
            "Tell me if there are more {a} than {b}.",
        ),
    ),
    "fewer": (
        (
            "Are there fewer {a} than {b}?",
            "Do you see fewer {a} than {b}?",
            "Does the {pic} show fewer {a} than {b}?",
            "Are there fewer {a} than {b} in the {pic}?",
            "Are there less {a} than {b}?",
        ),
        ("Can you see fewer {a} than {b}?", "Does the {pic} have fewer {a} than {b}?"),
    ),
    "which more": (
        (
            "Are there more {a} or more {b}?",
            "What are there more of, {a} or {b}?",
            "Which are there more of, {a} or {b}?",
            "Do you see more {a} or more {b}?",
        ),
        ("What do you see more of, {a} or {b}?", "Which do you see more of, {a} or {b}?"),
    ),
    "bigger": (
        (
            "Is {a} bigger than {b}?",
            "Is {a} larger than {b}?",
            "Does {a} look bigger than {b}?",
            "In the {pic}, is {a} bigger than {b}?",
            "Is it true that {a} is larger than {b}?",
            "Tell me if {a} is bigger than {b}.",
        ),
        (
            "Is {a} bigger than {b} in the {pic}?",
            "Does {a} look larger than {b}?",
            "Is it true that {a} is bigger than {b}?",
        ),
    ),
    "smaller": (
        (
            "Is {a} smaller than {b}?",
            "Does {a} look smaller than {b}?",
            "In the {pic}, is {a} smaller than {b}?",
            "Is it true that {a} is smaller than {b}?",
        ),
        ("Is {a} smaller than {b} in the {pic}?", "Tell me if {a} is smaller than {b}."),
    ),
    "which bigger": (
        (
            "Which is bigger, {a} or {b}?",
            "Which one is larger, {a} or {b}?",
            "What is bigger: {a} or {b}?",
            "Which is larger, {a} or {b}?",
            "Is {a} or {b} bigger?",
        ),
        (
            "Which one is bigger, {a} or {b}?",
            "Tell me which is larger, {a} or {b}.",
            "Which thing is bigger, {a} or {b}?",
        ),
    ),
    "which smaller": (
        (
            "Which is smaller, {a} or {b}?",
            "Which one is smaller, {a} or {b}?",
            "What is smaller: {a} or {b}?",
            "Is {a} or {b} smaller?",
        ),
        ("Which thing is smaller, {a} or {b}?", "Tell me which is smaller, {a} or {b}."),
    ),
    "biggest": (
        (
            "What is the biggest thing?",
            "Which thing is the largest?",
            "What is the largest thing in the {pic}?",
            "Which is the biggest?",
            "Name the biggest thing.",
            "What is biggest in the {pic}?",
            "Which is the largest thing?",
        ),
        (
            "What is the biggest thing in the {pic}?",
            "Which thing is the biggest?",
            "Name the largest thing in the {pic}.",
        ),
    ),
    "smallest": (
        (
            "What is the smallest thing?",
            "Which thing is the smallest?",
            "Which is the smallest?",
            "Name the smallest thing.",
            "What is smallest in the {pic}?",
        ),
        ("What is the smallest thing in the {pic}?", "Which is the smallest thing?"),
    ),
    "exist": (
        (
            "Is there {a}?",
            "Is there {a} in the {pic}?",
            "Do you see {a}?",
            "Does the {pic} contain {a}?",
            "Can you see {a}?",
            "Is {a} present?",
            "Does the {pic} show {a}?",
            "Can you find {a} in the {pic}?",
            "Is {a} shown?",
            "Tell me if there is {a}.",
            "Is {a} there?",
            "Do you see {a} anywhere?",
        ),
        (
            "Is {a} in the {pic}?",
            "Can you see {a} in the {pic}?",
            "Can you find {a}?",
            "Does the {pic} have {a}?",
            "Do you see {a} in the {pic}?",
        ),
    ),
    "exist any": (
        (
            "Are there any {s}?",
            "Are there any {s} in the {pic}?",
            "Do you see any {s}?",
            "Can you see any {s}?",
            "Does the {pic} contain {s}?",
            "Does the {pic} show any {s}?",
            "Are there {s} in the {pic}?",
        ),
        ("Can you see any {s} in the {pic}?", "Does the {pic} have any {s}?", "Are any {s} there?"),
    ),
    "not exist": (
        (
            "Is there no {n} in the {pic}?",
            "Is there no {n}?",
            "Is no {n} present?",
            "Is it true that there is no {n}?",
        ),
        ("Is it true that there is no {n} in the {pic}?", "Is no {n} there?"),
    ),
    "says": (
        (
            'Does it say "{w}"?',
            'Is the text "{w}"?',
            'Does the {pic} say "{w}"?',
            'Can you read "{w}"?',
            'Is "{w}" written there?',
        ),
        ('Is "{w}" written in the {pic}?', 'Can you read "{w}" in the {pic}?'),
    ),
    "read": (
        (
            "What does it say?",
            "What is written here?",
            "Read the text.",
            "What text is in the {pic}?",
            "What does the text say?",
            "What is written in the {pic}?",
            "Read this.",
            "What can you read?",
            "What is the text?",
            "Can you read this?",
            "Tell me what is written.",
            "What text do you see?",
            "Read what is written in the {pic}.",
            "What does the {pic} say?",
        ),
        (
            "Read the text in the {pic}.",
            "What does the text in the {pic} say?",
            "Can you read the text?",
            "What can you read in the {pic}?",
            "Tell me what it says.",
        ),
    ),
    "read word": (
        (
            "What word is this?",
            "What is the word?",
            "Read the word.",
            "Which word do you see?",
            "What word is written here?",
            "Which word is in the {pic}?",
            "What does the word say?",
            "Tell me the word.",
        ),
        ("What word do you see?", "Which word is this?", "Read the word in the {pic}.", "Which word is written here?"),
    ),
    "read number": (
        (
            "What number is this?",
            "What is the number?",
            "Read the number.",
            "Which number do you see?",
            "What number is written here?",
            "Which number is in the {pic}?",
            "What does the number say?",
            "Tell me the number.",
        ),
        (
            "What number do you see?",
            "Which number is this?",
            "Read the number in the {pic}.",
            "Which number is written here?",
        ),
    ),
    "read letters": (
        (
            "What letters are these?",
            "Read the letters.",
            "Which letters do you see?",
            "What letters are written here?",
            "Which letters are in the {pic}?",
            "Tell me the letters.",
            "What do the letters say?",
        ),
        ("What letters do you see?", "Which letters are these?", "Read the letters in the {pic}."),
    ),
    "read line": (
        (
            "What is the {which} word?",
            "Read the {which} word.",
            "What does the {which} word say?",
            "Which word is the {which} one?",
            "Tell me the {which} word.",
            "What is written on the {which} line?",
        ),
        ("What word is the {which} one?", "Read the {which} line.", "What does the {which} line say?"),
    ),
    "pair more": (
        (
            "Which {pic} has more {s}?",
            "Which {pic} shows more {s}?",
            "In which {pic} are there more {s}?",
            "Which of the two {pic}s has more {s}?",
            "Where are more {s}, in the first or in the second {pic}?",
            "Does the first or the second {pic} have more {s}?",
            "Which {pic} contains more {s}?",
        ),
        (
            "Which of the two {pic}s shows more {s}?",
            "In which {pic} do you see more {s}?",
            "Which one has more {s}, the first or the second {pic}?",
        ),
    ),
    "pair which": (
        (
            "Which {pic} has {a}?",
            "Which {pic} shows {a}?",
            "In which {pic} is {a}?",
            "Which of the two {pic}s has {a}?",
            "In which {pic} do you see {a}?",
            "Which {pic} contains {a}?",
            "Where is {a}, in the first or in the second {pic}?",
        ),
        (
            "Which of the two {pic}s shows {a}?",
            "In which {pic} can you see {a}?",
            "Which of these {pic}s contains {a}?",
        ),
    ),
    "pair both": (
        (
            "Do both {pic}s show {a}?",
            "Is there {a} in both {pic}s?",
            "Do both {pic}s contain {a}?",
            "Do you see {a} in both {pic}s?",
        ),
        ("Do both {pic}s have {a}?", "Can you see {a} in both {pic}s?"),
    ),
    "pair same": (
        (
            "Are the two {pic}s the same?",
            "Are they the same?",
            "Do both {pic}s show the same?",
            "Is the first {pic} the same as the second?",
            "Are these {pic}s the same?",
            "Do the {pic}s show the same things?",
            "Do they show the same?",
        ),
        ("Are these two {pic}s the same?", "Do both {pic}s show the same things?", "Are both {pic}s the same?"),
    ),
    "pair different": (
        (
            "Are the two {pic}s different?",
            "Are they different?",
            "Is the first {pic} different from the second?",
            "Is there a difference between the {pic}s?",
        ),
        ("Are these {pic}s different?", "Is there a difference between the two {pic}s?"),
    ),
}

_PICTURE_WORDS = ("picture", "image", "photo", "drawing", "scene")
_PREFIXES = ("Please answer: ", "Look at the picture. ", "Hey, ", "Look at this. ", "Question: ", "Please tell me: ")
_SUFFIXES = (" Please.", " Thanks!", " Answer with one word.", " Answer briefly.", " Keep it short.")


def phrase(rng: random.Random, split: Split, intent: str, **slots: str) -> str:
    """Word a question.

    Training wordings also come with lower case, without their question mark, and within polite phrases.
    """
    training, held_out = PHRASES[intent]
    text = rng.choice(training if split == "train" else held_out)
    picture = rng.choices(_PICTURE_WORDS, (55, 25, 7, 7, 6))[0]
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


# Words for things -----------------------------------------------------------------------------------------------------

COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_IRREGULAR = {
    "mouse": "mice",
    "computer mouse": "computer mice",
    "goose": "geese",
    "wolf": "wolves",
    "foot": "feet",
    "tooth": "teeth",
    "knife": "knives",
    "scarf": "scarves",
    "maple leaf": "maple leaves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "sheep": "sheep",
    "fish": "fish",
    "pufferfish": "pufferfish",
    "jellyfish": "jellyfish",
    "deer": "deer",
    "moose": "moose",
    "bison": "bison",
    "shrimp": "shrimp",
    "squid": "squid",
    "dice": "dice",
    "fruit": "fruits",
}
_CATEGORY_NOUNS = {
    "animal": "animal",
    "fruit": "fruit",
    "vehicle": "vehicle",
    "building": "building",
    "instrument": "musical instrument",
}
_DISTINCT_CATEGORIES = frozenset(
    {"animal", "fruit", "vehicle", "building", "instrument", "ball", "drink", "clothing", "device"}
)
"""Categories whose members nobody would count under another one."""


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(noun: str) -> str:
    """Put a or an before a noun."""
    if noun.startswith(("unicorn", "ufo")):
        return "a " + noun
    return ("an " if noun[0] in "aeiou" or noun.startswith("hourglass") else "a ") + noun


def noun_of(thing: Thing) -> str:
    """Return what a thing is called in full: "red circle", "dog"."""
    return f"{thing.color} {thing.name}" if thing.kind == "shape" else thing.name


def an(thing: Thing) -> str:
    """Return "a red circle", "an apple", "fries"."""
    return with_article(noun_of(thing)) if thing.countable else thing.name


def place_of(thing: Thing) -> tuple[int, int]:
    """Return row and column of the third of the picture that holds a thing's centre."""
    return min(2, int(3 * thing.y)), min(2, int(3 * thing.x))


PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)


def place_name(thing: Thing) -> str:
    """Return where a thing is: "top left", "center"."""
    row, column = place_of(thing)
    return PLACES[row][column]


def place_phrase(place: str) -> str:
    """Return "at the top left", "on the left", "in the center"."""
    if place == "center":
        return "in the center"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def _groups(scene: Scene) -> list[list[Thing]]:
    """Group equal things that are not text, in reading order of each group's first."""
    groups: dict[str, list[Thing]] = {}
    for thing in sorted((t for t in scene.things if t.kind != "text"), key=lambda t: (place_of(t)[0], t.x)):
        groups.setdefault(noun_of(thing), []).append(thing)
    return list(groups.values())


def _group_phrase(group: list[Thing]) -> str:
    if len(group) == 1:
        return an(group[0])
    return f"{COUNT_WORDS[len(group)]} {plural(noun_of(group[0]))}"


def join(parts: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _text_phrase(scene: Scene, thing: Thing) -> str:
    return f'the {scene.text_kind} "{SPELLED}{thing.name}{SPELLED}"'


def _texts(scene: Scene) -> list[Thing]:
    return sorted((t for t in scene.things if t.kind == "text"), key=lambda t: t.y)


def list_of(scene: Scene) -> str:
    """Say what is in a scene: "two red circles, a dog and the word "hello""."""
    parts = [_group_phrase(group) for group in _groups(scene)]
    parts += [_text_phrase(scene, thing) for thing in _texts(scene)]
    return join(parts) if parts else "nothing"


def caption_of(scene: Scene) -> str:
    """Describe a scene in a sentence or two: what, where, and the background if it has one plain colour."""
    parts = []
    for group in _groups(scene):
        where = f" {place_phrase(place_name(group[0]))}" if len(group) == 1 else ""
        parts.append(_group_phrase(group) + where)
    parts += [f"{_text_phrase(scene, thing)} in {thing.color}" for thing in _texts(scene)]
    text = join(parts) if parts else "an empty picture"
    text = text[0].upper() + text[1:] + "."
    if scene.background.color:
        text += f" The background is {scene.background.color}."
    return text


def caption_facts(caption: str) -> list[str]:
    """Take a caption apart into what it claims, for scoring: each thing, each thing's place, the background."""
    facts = []
    for sentence in caption.rstrip(".").split(". "):
        lowered = sentence[:1].lower() + sentence[1:]
        for part in lowered.replace(" and ", ", ").split(", "):
            for mark in (" at the ", " on the ", " in the ", " in "):
                noun, found, place = part.partition(mark)
                if found:
                    facts.extend((noun, f"{noun}{mark}{place}"))
                    break
            else:
                facts.append(part)
    return facts


def recall(truth: str, answer: str) -> float:
    """Return the share of a true caption's facts that an answer states."""
    wanted, given = caption_facts(truth), caption_facts(answer)
    return sum(fact in given for fact in wanted) / len(wanted)


# Intents: each asks one question about a scene, or returns None where the scene cannot bear it. -----------------------

Intent = Callable[[Scene, random.Random, Split], Question | None]


def _shapes(scene: Scene) -> list[Thing]:
    return [t for t in scene.things if t.kind == "shape"]


def _pictograms(scene: Scene) -> list[Thing]:
    return [t for t in scene.things if t.kind == "pictogram"]


def _solid(scene: Scene) -> list[Thing]:
    return [t for t in scene.things if t.kind != "text"]


def _definite(scene: Scene, thing: Thing, rng: random.Random, *, hide_color: bool = False) -> str | None:
    """Return words that single a thing out, or None where there are none."""
    options = []
    if thing.kind == "text":
        if len(_texts(scene)) > 1:
            return None
        text_kind = scene.text_kind
        return "the text" if text_kind == "letters" or rng.random() < 0.5 else f"the {text_kind}"
    same_name = sum(t.name == thing.name for t in _solid(scene))
    if same_name == 1:
        options.append(f"the {thing.name}")
    if thing.kind == "shape" and not hide_color:
        if sum(noun_of(t) == noun_of(thing) for t in _solid(scene)) == 1:
            options += [f"the {noun_of(thing)}"] * 2
        if sum(t.color == thing.color for t in scene.things) == 1 and not _pictograms(scene):
            options.append(f"the {thing.color} {rng.choice(('thing', 'shape', 'one'))}")
    if not options and len(_shapes(scene)) == 1 and thing.kind == "shape":
        options.append("the shape")
    return rng.choice(options) if options else None


def _pick(
    scene: Scene, rng: random.Random, things: list[Thing], *, hide_color: bool = False
) -> tuple[Thing, str] | None:
    """Choose a thing that words can single out, and such words."""
    things = list(things)
    rng.shuffle(things)
    for thing in things:
        words = _definite(scene, thing, rng, hide_color=hide_color)
        if words:
            return thing, words
    return None


def _two(scene: Scene, rng: random.Random) -> tuple[Thing, str, Thing, str] | None:
    things = _solid(scene)
    rng.shuffle(things)
    named = []
    for thing in things:
        words = _definite(scene, thing, rng)
        if words:
            named.append((thing, words))
        if len(named) == 2:
            return (*named[0], *named[1])
    return None


def ask_what(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask what the only thing in the picture is."""
    things = _solid(scene)
    if len(scene.things) != 1 or not things:
        return None
    return Question("name", phrase(rng, split, "what is this"), an(things[0]))


def ask_category(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask which animal is there, or what kind of thing one is."""
    things = [t for t in _pictograms(scene) if t.category in _CATEGORY_NOUNS]
    picked = _pick(scene, rng, things)
    if picked is None:
        return None
    thing, words = picked
    noun = _CATEGORY_NOUNS[thing.category or ""]
    if rng.random() < 0.35:
        return Question("category", phrase(rng, split, "category", t=words), with_article(noun))
    if {t.name for t in _pictograms(scene) if t.category == thing.category} != {thing.name}:
        return None
    if any(t.category not in _DISTINCT_CATEGORIES for t in _pictograms(scene)):
        return None
    return Question("category", phrase(rng, split, "which of category", c=noun), an(thing))


def ask_shape(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for the shape of the thing of some colour."""
    shapes = _shapes(scene)
    if len(shapes) == 1 and len(scene.things) == 1 and rng.random() < 0.7:
        return Question("shape", phrase(rng, split, "only shape"), shapes[0].name)
    shapes = [s for s in shapes if sum(t.color == s.color for t in shapes) == 1]
    if not shapes or any(t.kind == "text" for t in scene.things):
        return None
    thing = rng.choice(shapes)
    return Question("shape", phrase(rng, split, "shape", c=thing.color or ""), thing.name)


def ask_color(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for the colour of a shape or of the print."""
    things = [t for t in scene.things if t.kind in ("shape", "text")]
    picked = _pick(scene, rng, things, hide_color=True)
    if picked is None:
        return None
    thing, words = picked
    return Question("color", phrase(rng, split, "color", t=words), thing.color or "")


def ask_background(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for the colour of a plain background."""
    if scene.background.color is None:
        return None
    return Question("background", phrase(rng, split, "background"), scene.background.color)


def _count_targets(scene: Scene, rng: random.Random, split: Split) -> list[tuple[str, int]]:
    """Return plurals that can be counted here, with their numbers; some are absent on purpose."""
    shapes, pictograms = _shapes(scene), _pictograms(scene)
    targets: list[tuple[str, int]] = []
    for thing in shapes:
        targets.append((plural(thing.name), sum(t.name == thing.name for t in shapes)))
        targets.append((plural(noun_of(thing)), sum(noun_of(t) == noun_of(thing) for t in shapes)))
        if not pictograms and not _texts(scene):
            noun = rng.choice(("shapes", "things"))
            targets.append((f"{thing.color} {noun}", sum(t.color == thing.color for t in shapes)))
    if shapes:
        targets.append(("shapes", len(shapes)))
    for thing in pictograms:
        if thing.countable:
            targets.append((plural(thing.name), sum(t.name == thing.name for t in pictograms)))
        if thing.category in _CATEGORY_NOUNS and all(t.category in _DISTINCT_CATEGORIES for t in pictograms):
            noun = plural(_CATEGORY_NOUNS[thing.category])
            targets.append((noun, sum(t.category == thing.category for t in pictograms)))
    if not _texts(scene):
        targets.append(("things", len(scene.things)))
        if not shapes or rng.random() < 0.3:
            targets.append(("objects", len(scene.things)))
    if rng.random() < 0.25:
        targets.append((plural(noun), 0) if (noun := _absent_noun(scene, rng)) else ("things", len(scene.things)))
    return targets


def _absent_noun(scene: Scene, rng: random.Random) -> str | None:
    """Return a countable noun that nothing here answers to, close to what is here where possible."""
    shapes, pictograms = _shapes(scene), _pictograms(scene)
    present = {noun_of(t) for t in scene.things} | {t.name for t in scene.things if t.kind != "text"}
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


def ask_count(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for a number of things, or of letters."""
    if scene.recipe == "text":
        texts = _texts(scene)
        if len(texts) != 1 or scene.text_kind != "word" or rng.random() < 0.5:
            return None
        return Question("count", phrase(rng, split, "letters"), str(len(texts[0].name)))
    targets = _count_targets(scene, rng, split)
    if not targets:
        return None
    noun, number = rng.choice(targets)
    if number <= 1 and rng.random() < 0.5:
        noun, number = max(rng.sample(targets, min(3, len(targets))), key=lambda target: target[1])
    return Question("count", phrase(rng, split, "count", s=noun), str(number))


def ask_position(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask where a thing is, or what is somewhere."""
    if scene.recipe == "text":
        return None
    if rng.random() < 0.65:
        picked = _pick(scene, rng, _solid(scene))
        if picked is None:
            return None
        thing, words = picked
        return Question("position", phrase(rng, split, "position", t=words), place_name(thing))
    if _texts(scene):
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
    picked = _pick(scene, rng, [t for t in _shapes(scene) if t.direction])
    if picked is None:
        return None
    thing, words = picked
    return Question("direction", phrase(rng, split, "direction", t=words), thing.direction or "")


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


def _offset(first: Thing, second: Thing, side: str) -> float:
    """Return how far ``first`` lies to that side of ``second``, as a fraction of the picture."""
    return {
        "left": second.x - first.x,
        "right": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }[side]


def ask_relation(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask how two things lie to each other."""
    two = _two(scene, rng)
    if two is None:
        return None
    first, first_words, second, second_words = two
    side = rng.choice(tuple(_RELATIONS))
    offset = _offset(first, second, side)
    words = rng.choice(_RELATIONS[side])
    draw = rng.random()
    if draw < 0.3 and not _texts(scene) and words not in ("higher than", "lower than"):
        others = [t for t in scene.things if t is not second]
        offsets = [_offset(t, second, side) for t in others]
        hits = [t for t, o in zip(others, offsets, strict=True) if o >= CLEARLY]
        if len(hits) != 1 or any(0 <= o < CLEARLY for o in offsets):
            return None
        return Question("relation", phrase(rng, split, "what relation", rel=words, b=second_words), an(hits[0]))
    if abs(offset) < CLEARLY:
        return None
    if draw < 0.5:
        answer = first_words if offset > 0 else second_words
        further = rng.choice(_FURTHER[side])
        return Question(
            "relation", phrase(rng, split, "which side", further=further, a=first_words, b=second_words), answer
        )
    answer = "yes" if offset > 0 else "no"
    return Question("relation", phrase(rng, split, "relation", rel=words, a=first_words, b=second_words), answer)


BIGGER = 1.45
"""Least ratio of extents in area for one thing to be bigger than another."""


def ask_comparison(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask which things are more, or bigger."""
    solid = _solid(scene)
    if len(solid) < 2 or _texts(scene):
        return None
    draw = rng.random()
    if draw < 0.45:
        groups: dict[str, int] = {}
        by_color = len({t.name for t in solid}) == 1 or rng.random() < 0.3
        for thing in solid:
            if not thing.countable:
                continue
            noun = plural(noun_of(thing) if by_color else thing.name)
            groups[noun] = groups.get(noun, 0) + 1
        if len(groups) < 2:
            return None
        nouns = list(groups)
        first, second = rng.sample(nouns, 2)
        if groups[first] == groups[second] and rng.random() < 0.7:
            return None
        kind = rng.random()
        if kind < 0.4:
            answer = "yes" if groups[first] > groups[second] else "no"
            return Question("comparison", phrase(rng, split, "more", a=first, b=second), answer)
        if kind < 0.6:
            answer = "yes" if groups[first] < groups[second] else "no"
            return Question("comparison", phrase(rng, split, "fewer", a=first, b=second), answer)
        if groups[first] == groups[second]:
            return None
        answer = first if groups[first] > groups[second] else second
        return Question("comparison", phrase(rng, split, "which more", a=first, b=second), answer)
    if draw < 0.6:
        ordered = sorted(solid, key=lambda t: -t.area)
        if draw < 0.53:
            if ordered[0].area < BIGGER * ordered[1].area:
                return None
            return Question("comparison", phrase(rng, split, "biggest"), an(ordered[0]))
        if ordered[-2].area < BIGGER * ordered[-1].area:
            return None
        return Question("comparison", phrase(rng, split, "smallest"), an(ordered[-1]))
    two = _two(scene, rng)
    if two is None:
        return None
    first, first_words, second, second_words = two
    if max(first.area, second.area) < BIGGER * min(first.area, second.area):
        return None
    bigger = first.area > second.area
    slots = {"a": first_words, "b": second_words}
    if draw < 0.72:
        return Question("comparison", phrase(rng, split, "bigger", **slots), "yes" if bigger else "no")
    if draw < 0.82:
        return Question("comparison", phrase(rng, split, "smaller", **slots), "no" if bigger else "yes")
    if draw < 0.92:
        return Question(
            "comparison", phrase(rng, split, "which bigger", **slots), first_words if bigger else second_words
        )
    return Question("comparison", phrase(rng, split, "which smaller", **slots), second_words if bigger else first_words)


def ask_exist(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask whether something is there."""
    if scene.recipe == "text":
        thing = rng.choice(_texts(scene))
        if rng.random() < 0.5:
            return Question("exist", phrase(rng, split, "says", w=thing.name), "yes")
        letters = list(thing.name)
        for _ in range(rng.choice((1, 2, len(letters)))):
            position = rng.randrange(len(letters))
            pool = "0123456789" if letters[0].isdigit() else "abcdefghijklmnopqrstuvwxyz"
            swap = rng.choice(pool)
            letters[position] = swap.upper() if letters[position].isupper() else swap
        other = "".join(letters)
        if any(other == t.name for t in _texts(scene)):
            return None
        return Question("exist", phrase(rng, split, "says", w=other), "no")
    draw = rng.random()
    yes = bool(_solid(scene)) and rng.random() < 0.5
    if draw < 0.15 and all(t.category in _DISTINCT_CATEGORIES for t in _pictograms(scene)) and _pictograms(scene):
        present = {t.category for t in _pictograms(scene)}
        category = rng.choice(tuple(_CATEGORY_NOUNS))
        noun = _CATEGORY_NOUNS[category]
        answer = "yes" if category in present else "no"
        if rng.random() < 0.5:
            return Question("exist", phrase(rng, split, "exist", a=with_article(noun)), answer)
        return Question("exist", phrase(rng, split, "exist any", s=plural(noun)), answer)
    if yes:
        thing = rng.choice(_solid(scene))
        if not thing.countable:
            return Question("exist", phrase(rng, split, "exist any", s=thing.name), "yes")
        noun = noun_of(thing) if thing.kind == "pictogram" or rng.random() < 0.7 else thing.name
        if thing.kind == "shape" and not _pictograms(scene) and not _texts(scene) and rng.random() < 0.15:
            noun = f"{thing.color} {rng.choice(('thing', 'shape'))}"
    else:
        noun = _absent_noun(scene, rng)
        if noun is None:
            return None
    if draw < 0.75:
        return Question("exist", phrase(rng, split, "exist", a=with_article(noun)), "yes" if yes else "no")
    if draw < 0.9:
        return Question("exist", phrase(rng, split, "exist any", s=plural(noun)), "yes" if yes else "no")
    return Question("exist", phrase(rng, split, "not exist", n=noun), "no" if yes else "yes")


def ask_absent(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask about a thing that is not there, as if it were."""
    noun = _absent_noun(scene, rng)
    if noun is None or scene.recipe == "text":
        return None
    intent = "position"
    if noun in SHAPES and rng.random() < 0.6:
        intent = "color"
    return Question("absent", phrase(rng, split, intent, t=f"the {noun}"), f"There is no {noun}.")


def ask_read(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for the printed text."""
    texts = _texts(scene)
    if not texts:
        return None
    text_kind = scene.text_kind
    kind = f"read {text_kind}"
    if len(texts) == 2:
        if rng.random() < 0.5 and text_kind == "word":
            line = rng.randrange(2)
            which = rng.choice((("first", "top", "upper"), ("second", "bottom", "lower"))[line])
            return Question(kind, phrase(rng, split, "read line", which=which), f"{SPELLED}{texts[line].name}{SPELLED}")
        return Question(kind, phrase(rng, split, "read"), f"{SPELLED}{texts[0].name} {texts[1].name}{SPELLED}")
    intent = "read" if rng.random() < 0.5 else kind
    return Question(kind, phrase(rng, split, intent), f"{SPELLED}{texts[0].name}{SPELLED}")


def ask_list(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for everything in the picture."""
    return Question("list", phrase(rng, split, "list"), list_of(scene))


def ask_caption(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for a description."""
    return Question("caption", phrase(rng, split, "caption"), caption_of(scene))


INTENTS: dict[str, Intent] = {
    "name": ask_what,
    "category": ask_category,
    "shape": ask_shape,
    "color": ask_color,
    "background": ask_background,
    "count": ask_count,
    "position": ask_position,
    "direction": ask_direction,
    "relation": ask_relation,
    "comparison": ask_comparison,
    "exist": ask_exist,
    "absent": ask_absent,
    "read": ask_read,
    "list": ask_list,
    "caption": ask_caption,
}

INTENT_WEIGHTS: dict[str, float] = {
    "name": 4.0,
    "category": 1.6,
    "shape": 1.0,
    "color": 1.0,
    "background": 1.0,
    "count": 1.8,
    "position": 1.4,
    "direction": 2.2,
    "relation": 2.8,
    "comparison": 2.6,
    "exist": 1.2,
    "absent": 0.4,
    "read": 4.0,
    "list": 0.9,
    "caption": 0.9,
}
"""How often training tries each intent on a scene; a scene bears only some."""


def questions_about(
    scene: Scene, rng: random.Random, split: Split, count: int, weights: dict[str, float] = INTENT_WEIGHTS
) -> list[Question]:
    """Ask up to ``count`` different questions about one scene."""
    names, odds = list(weights), list(weights.values())
    asked: dict[str, Question] = {}
    for name in rng.choices(names, odds, k=3 * count):
        question = INTENTS[name](scene, rng, split)
        if question is not None:
            asked.setdefault(question.question, question)
        if len(asked) == count:
            break
    return list(asked.values())


# Conversation without a picture's facts -------------------------------------------------------------------------------

_OFF_TOPIC_ANSWER = "I can only answer questions about pictures."
_CHAT: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hi!", "Hello there.", "Hey!", "Good morning!", "Hi, how are you?", "Hello"),
        ("Hi there!", "Good evening!", "Hello, how are you?"),
        "Hello! Ask me about a picture.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "What can you do?", "Tell me about you.", "Help"),
        ("What's your name?", "Tell me who you are.", "What can you do for me?"),
        "I am a small demo model. I can name things, read words and describe shapes in a picture.",
    ),
    (
        ("Thanks!", "Thank you!", "Thank you very much.", "Thanks a lot."),
        ("Many thanks!", "Thank you a lot!"),
        "You are welcome.",
    ),
    (
        (
            "What is the capital of France?",
            "Who wrote this book?",
            "What is the weather like today?",
            "Tell me a joke.",
            "Write a poem.",
            "What is two plus two?",
            "Who is the president?",
            "What time is it?",
            "How old are you?",
            "Translate this to German.",
            "Write a function in Python.",
            "What is the meaning of life?",
            "How do I cook rice?",
            "Tell me a story about a dragon.",
            "What is the capital of Japan?",
            "How far is the moon?",
        ),
        ("What is the capital of Spain?", "Tell me a story.", "Write a poem about a cat.", "How do I cook an egg?"),
        _OFF_TOPIC_ANSWER,
    ),
)


def ask_chat(rng: random.Random, split: Split) -> Question:
    """Greet, or ask what no picture answers."""
    training, held_out, answer = rng.choice(_CHAT)
    text = rng.choice(training if split == "train" else held_out)
    return Question("chat", decorate(rng, text, brief=False) if split == "train" else text, answer)


# Two pictures ---------------------------------------------------------------------------------------------------------


def _changed(scene: Scene, rng: random.Random, split: Split) -> Scene | None:
    """Return the scene with one visible thing changed: recoloured, replaced, moved away or removed."""
    other = copy.deepcopy(scene)
    things = _solid(other)
    if not things:
        return None
    thing = rng.choice(things)
    place = other.things.index(thing)
    aspect = other.width / other.height
    draw = rng.random()
    if draw < 0.25 and len(things) > 1:
        del other.things[place]
        return other
    size = max(0.14, min(thing.w * min(1.0, aspect), thing.h * min(1.0, 1 / aspect)))
    if thing.kind == "shape":
        for _ in range(20):
            name, color = thing.name, thing.color or ""
            if draw < 0.65:
                color = sample_color(rng, other.background) or color
            else:
                name = rng.choice(SHAPES)
            if (name, color) == (thing.name, thing.color) or {name, thing.name} in (
                {"circle", "oval"},
                {"square", "rectangle"},
            ):
                continue
            if split == "train" and is_held_out_combination(name, color):
                continue
            if name == thing.name:
                new = copy.copy(thing)
                new.color, new.rgb = color, shade_for(rng, color, other.background)
            else:
                new = make_shape(rng, name, color, size, aspect, other.background)
            new.x = min(max(thing.x, new.w / 2), 1 - new.w / 2)
            new.y = min(max(thing.y, new.h / 2), 1 - new.h / 2)
            other.things[place] = new
            return other
        return None
    present = {t.index for t in _pictograms(other)}
    for _ in range(20):
        candidate = rng.choice(pack.pictograms().things)
        clash = any((candidate.index + index) % 7 == 0 for index in present if index != thing.index)
        if candidate.index in present or (split == "train" and clash):
            continue
        new = make_pictogram(rng, candidate, size, aspect, (thing.style,))
        new.x, new.y, new.w, new.h = thing.x, thing.y, thing.w, thing.h
        other.things[place] = new
        return other
    return None


def _redrawn(scene: Scene, rng: random.Random) -> Scene:
    """Return the same scene at another size and with other noise and compression."""
    other = copy.deepcopy(scene)
    scale = rng.uniform(0.8, 1.25)
    other.width, other.height = round(scene.width * scale), round(scene.height * scale)
    other.jpeg_quality = 0 if rng.random() < 0.6 else rng.randint(40, 92)
    other.noise = 0.0 if rng.random() < 0.6 else rng.uniform(2, 12)
    other.seed = rng.getrandbits(31)
    return other


_ORDINALS = ("first", "second")


def sample_pair(rng: random.Random, split: Split, kind: str | None = None) -> tuple[Scene, Scene, list[Question]]:
    """Draw two scenes and questions about both, in the words of "the first" and "the second" picture.

    Args:
        rng: the only source of chance.
        split: train or test.
        kind: one of the pair kinds, or None for all that these pictures bear.
    """
    recipe = rng.choices(RECIPES, (30, 25, 8, 17, 10, 6, 4, 0))[0]
    first = sample_scene(rng, split, recipe)
    relation = rng.random()
    same = relation < 0.25
    if same:
        second = _redrawn(first, rng)
    elif relation < 0.55:
        changed = _changed(first, rng, split)
        second = _redrawn(changed, rng) if changed else sample_scene(rng, split, recipe)
    else:
        second = sample_scene(rng, split, recipe if rng.random() < 0.7 else None)
    same = same and first.things == second.things
    scenes = (first, second)
    questions: list[Question] = []

    if kind in (None, "pair same"):
        if rng.random() < 0.7:
            questions.append(Question("pair same", phrase(rng, split, "pair same"), "yes" if same else "no"))
        else:
            questions.append(Question("pair same", phrase(rng, split, "pair different"), "no" if same else "yes"))
    if kind in (None, "pair more") and not any(_texts(s) for s in scenes):
        targets = [noun for scene in scenes for noun, _ in _count_targets(scene, rng, split)]
        noun = rng.choice(targets) if targets else "things"
        counts = [_count_of(scene, noun) for scene in scenes]
        if counts[0] == counts[1] and rng.random() < 0.6:
            noun = "things"
            counts = [_count_of(scene, noun) for scene in scenes]
        if None not in counts and (counts[0] != counts[1] or rng.random() < 0.35):
            ahead = (counts[0] or 0) - (counts[1] or 0)
            answer = "the first" if ahead > 0 else "the second" if ahead < 0 else "the same number"
            questions.append(Question("pair more", phrase(rng, split, "pair more", s=noun), answer))
    solid = [thing for scene in scenes for thing in _solid(scene) if thing.countable]
    if kind in (None, "pair which") and solid:
        thing = rng.choice(solid)
        noun = noun_of(thing)
        if thing.kind == "shape" and rng.random() < 0.3:
            noun = thing.name
        if rng.random() < 0.12:
            noun = _absent_noun(first, rng) or noun
        held = [any(noun in (noun_of(t), t.name) for t in _solid(scene)) for scene in scenes]
        if rng.random() < 0.75:
            answer = {(True, True): "both", (True, False): "the first", (False, True): "the second"}.get(
                (held[0], held[1]), "neither"
            )
            questions.append(Question("pair which", phrase(rng, split, "pair which", a=with_article(noun)), answer))
        else:
            answer = "yes" if all(held) else "no"
            questions.append(Question("pair which", phrase(rng, split, "pair both", a=with_article(noun)), answer))
    if kind in (None, "pair ask"):
        for _ in range(6):
            number = rng.randrange(2)
            name = rng.choice(("list", "count", "color", "exist", "position", "read", "name"))
            question = INTENTS[name](scenes[number], rng, split)
            if question is None:
                continue
            questions.append(Question("pair ask", _about(question.question, _ORDINALS[number], rng), question.answer))
            if len(questions) >= 4:
                break
    return first, second, questions


def _count_of(scene: Scene, noun: str) -> int | None:
    """Count what a plural names in a scene; None where that would be ambiguous."""
    if noun in ("things", "objects"):
        return len(scene.things)
    if noun == "shapes":
        return len(_shapes(scene))
    for category, name in _CATEGORY_NOUNS.items():
        if noun == plural(name):
            if any(t.category not in _DISTINCT_CATEGORIES for t in _pictograms(scene)):
                return None
            return sum(t.category == category for t in _pictograms(scene))
    color, _, rest = noun.partition(" ")
    if color in COLOR_NAMES and rest in ("things", "shapes"):
        return None if _pictograms(scene) else sum(t.color == color for t in _shapes(scene))
    return sum(noun in (plural(t.name), plural(noun_of(t))) for t in _solid(scene))


def _about(question: str, ordinal: str, rng: random.Random) -> str:
    """Turn a question about a picture into one about the first or the second."""
    for word in _PICTURE_WORDS:
        for determiner in ("the", "this"):
            if f"{determiner} {word}" in question:
                return question.replace(f"{determiner} {word}", f"the {ordinal} {word}", 1)
    ending = question[-1] if question[-1] in "?." else "?"
    stem = question.rstrip("?.")
    if rng.random() < 0.5 and stem.count(". ") == 0:
        return f"In the {ordinal} picture: {question}"
    return f"{stem} in the {ordinal} picture{ending}"
