"""Recipes: what the things of each family of scenes are.

A recipe takes a :class:`Setting` and returns the things, each with its place, and the kind of their print.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from opsin.demo import pack
from opsin.demo.scenes.colors import sample_color
from opsin.demo.scenes.held_out import is_held_out_combination, is_held_out_pair
from opsin.demo.scenes.layout import place
from opsin.demo.scenes.lettering import make_text, sample_text
from opsin.demo.scenes.pictograms import make_pictogram
from opsin.demo.scenes.scene import MOST_THINGS, SHAPES, TEXT_KINDS, Background, Recipe, Split, TextKind, Thing
from opsin.demo.scenes.shapes import make_shape

Contents = tuple[list[Thing], TextKind | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a scene's things are drawn for."""

    rng: random.Random
    split: Split
    aspect: float
    """Width over height of the picture."""
    background: Background
    styles: tuple[str, ...]
    """Icon sets to draw from."""
    only: str | None
    """For the recipe "name": the pictogram to show."""
    text_kind: TextKind | None
    """The print to draw; None draws its kind too."""

    def shape(self, name: str, color: str, size: float) -> Thing:
        """Make a shape."""
        return make_shape(self.rng, name, color, size, self.aspect, self.background)

    def pictogram(self, thing: pack.Pictogram, size: float, styles: tuple[str, ...]) -> Thing:
        """Make a pictogram."""
        return make_pictogram(self.rng, thing, size, self.aspect, styles)

    def text(self, text: str, room: tuple[float, float]) -> Thing:
        """Make a line of print."""
        return make_text(self.rng, text, self.split, self.aspect, self.background, room)


def _shape_pairs(setting: Setting, count: int) -> list[tuple[str, str]]:
    """Draw shapes and colours; the test's first pair is one that training never shows."""
    rng, test = setting.rng, setting.split == "test"
    pairs: list[tuple[str, str]] = []
    for _ in range(20 * count):
        if len(pairs) == count:
            break
        color = sample_color(rng, setting.background)
        if color is None:
            continue
        shape = rng.choice(SHAPES)
        if is_held_out_combination(shape, color) == test or (test and pairs):
            pairs.append((shape, color))
    return pairs


def _pictogram_set(setting: Setting, count: int) -> list[pack.Pictogram]:
    """Draw different pictograms; the test's first two are a pair that training never shows."""
    rng = setting.rng
    things = list(pack.pictograms().things)
    chosen: list[pack.Pictogram] = []
    while len(chosen) < count:
        pool = things
        if chosen and rng.random() < 0.25:
            # Company of the same category makes naming it harder.
            pool = [thing for thing in things if thing.category == chosen[0].category]
        thing = rng.choice(pool)
        if any(thing.index == other.index for other in chosen):
            continue
        clash = any(is_held_out_pair(thing.index, other.index) for other in chosen)
        if setting.split == "train" and clash:
            continue
        if setting.split == "test" and len(chosen) == 1 and not clash:
            thing = rng.choice([other for other in things if is_held_out_pair(chosen[0].index, other.index)])
        chosen.append(thing)
    return chosen


def _shapes(setting: Setting) -> Contents:
    """Draw two to six shapes."""
    rng = setting.rng
    count = rng.choice((2, 2, 3, 3, 4, 5, 6))
    largest = {2: 0.42, 3: 0.36, 4: 0.31, 5: 0.28, 6: 0.26}[count]
    things = [setting.shape(*pair, rng.uniform(0.13, largest)) for pair in _shape_pairs(setting, count)]
    return place(rng, sorted(things, key=lambda thing: -thing.area)), None


def _count(setting: Setting) -> Contents:
    """Draw up to nine shapes of few kinds."""
    rng = setting.rng
    kinds = _shape_pairs(setting, rng.choice((1, 2, 2, 3)))
    if rng.random() < 0.4 and len(kinds) > 1:
        # One shape in several colours, or one colour in several shapes, so that both words matter.
        shape, color = kinds[0]
        extra = rng.choice([(shape, kinds[1][1]), (kinds[1][0], color)])
        if setting.split == "test" or not is_held_out_combination(*extra):
            kinds[1] = extra
    total = rng.randint(2, MOST_THINGS)
    size = rng.uniform(0.11, min(0.3, 0.72 / math.sqrt(total)))
    things = []
    for number in range(total if kinds else 0):
        shape, color = kinds[number] if number < len(kinds) else rng.choice(kinds)
        scale = size * (1 if rng.random() < 0.5 else rng.uniform(0.85, 1.25))
        things.append(setting.shape(shape, color, max(0.1, scale)))
    return place(rng, things), None


def _single(setting: Setting) -> Contents:
    """Draw one shape."""
    things = [setting.shape(*pair, setting.rng.uniform(0.25, 0.88)) for pair in _shape_pairs(setting, 1)]
    return place(setting.rng, things), None


def _name(setting: Setting) -> Contents:
    """Draw one pictogram."""
    rng = setting.rng
    thing = rng.choice([thing for thing in pack.pictograms().things if setting.only in (None, thing.name)])
    large = rng.random() < 0.7
    size = rng.uniform(0.4, 0.97) if large else rng.uniform(0.22, 0.45)
    return place(rng, [setting.pictogram(thing, size, setting.styles)]), None


def _pictograms(setting: Setting) -> Contents:
    """Draw two to six different pictograms, some of them several times."""
    rng = setting.rng
    count = rng.choice((2, 2, 3, 3, 4, 5, 6))
    chosen = _pictogram_set(setting, count)
    largest = {2: 0.46, 3: 0.4, 4: 0.36, 5: 0.32, 6: 0.3}[count]
    styles = (rng.choice(setting.styles),) if rng.random() < 0.6 else setting.styles
    same_size = rng.uniform(0.2, largest) if rng.random() < 0.4 else 0.0
    things = []
    for thing in chosen:
        repeats = rng.choice((2, 3, 4)) if count <= 3 and thing.countable and rng.random() < 0.25 else 1
        for _ in range(repeats):
            size = same_size or rng.uniform(0.2, largest)
            size = min(size, 0.28) if repeats > 1 else size
            things.append(setting.pictogram(thing, size, styles))
    return place(rng, sorted(things, key=lambda thing: -thing.area), gap=0.01), None


def _mixed(setting: Setting) -> Contents:
    """Draw shapes, pictograms and, one time in three, a word or a number."""
    rng, split = setting.rng, setting.split
    pairs = _shape_pairs(setting, rng.choice((1, 2, 2, 3)))
    things = [setting.shape(*pair, rng.uniform(0.14, 0.3)) for pair in pairs]
    for thing in _pictogram_set(setting, rng.choice((1, 1, 2))):
        things.append(setting.pictogram(thing, rng.uniform(0.22, 0.36), setting.styles))
    text_kind = None
    if rng.random() < 0.35:
        text_kind = setting.text_kind or rng.choice(("word", "number"))
        text = sample_text(rng, split, text_kind)[:6]
        if text_kind == "word" and pack.is_held_out_text(text) != (split == "test"):
            # Cut short, the word fell on the other side of the split.
            text_kind = "number"
            text = sample_text(rng, split, "number")
        things.insert(0, setting.text(text, room=(0.62, 0.22)))
    return place(rng, things), text_kind


def _text(setting: Setting) -> Contents:
    """Draw one or two lines of print."""
    rng = setting.rng
    text_kind = setting.text_kind or rng.choices(TEXT_KINDS, (45, 25, 30))[0]
    lines = 2 if rng.random() < (0.2 if text_kind == "word" else 0.08) else 1
    room = (0.96, 0.7) if lines == 1 else (0.94, 0.36)
    things = []
    for line in range(lines):
        thing = setting.text(sample_text(rng, setting.split, text_kind), room)
        if lines == 2:
            thing.angle = 0.0
        half = thing.w / 2
        thing.x = rng.uniform(half + 0.01, max(half + 0.011, 0.99 - half))
        middle, reach = (0.5, 0.48) if lines == 1 else (0.27 + 0.46 * line, 0.22)
        slack = max(0.0, reach - thing.h / 2)
        thing.y = middle + rng.uniform(-slack, slack)
        things.append(thing)
    return things, text_kind


def _blank(setting: Setting) -> Contents:
    """Draw nothing."""
    return [], None


FILLINGS: dict[Recipe, Callable[[Setting], Contents]] = {
    "shapes": _shapes,
    "count": _count,
    "single": _single,
    "pictograms": _pictograms,
    "name": _name,
    "mixed": _mixed,
    "text": _text,
    "blank": _blank,
}
"""How each recipe fills a scene."""
