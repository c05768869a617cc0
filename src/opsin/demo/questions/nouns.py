"""Words for things: names, articles, plurals, categories."""

from __future__ import annotations

from collections.abc import Sequence

from opsin.demo.scenes import Scene, Thing

COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CATEGORY_NOUNS = {
    "animal": "animal",
    "fruit": "fruit",
    "vehicle": "vehicle",
    "building": "building",
    "instrument": "musical instrument",
}
"""What the categories that questions ask about are called."""

_DISTINCT_CATEGORIES = frozenset(
    {"animal", "fruit", "vehicle", "building", "instrument", "ball", "drink", "clothing", "device"}
)
"""Categories whose members nobody would count under another one."""

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


def join(parts: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def noun_of(thing: Thing) -> str:
    """Return what a thing is called in full: "red circle", "dog"."""
    return f"{thing.color} {thing.name}" if thing.kind == "shape" else thing.name


def an(thing: Thing) -> str:
    """Return "a red circle", "an apple", "fries"."""
    return with_article(noun_of(thing)) if thing.countable else thing.name


def has_clear_categories(scene: Scene) -> bool:
    """Say whether nobody would dispute which category each pictogram belongs to."""
    return all(thing.category in _DISTINCT_CATEGORIES for thing in scene.pictograms)
