"""Scenes of shapes, pictograms and printed text, drawn from a seed.

Owns: what a scene holds (:class:`Scene`), how one is drawn at random (:func:`sample_scene`), how it becomes a picture
(:func:`render`), and what training keeps back for the test. Questions about scenes are in :mod:`opsin.demo.questions`.

All positions and sizes are fractions of the picture's width and height, because the model sees every picture
stretched to one square.

What the test draws and training never does: ten font families, three kinds of background, one word or number in ten,
one pair of shape and colour in six, one pair of pictograms in seven.
"""

from __future__ import annotations

import colorsys
import io
import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from opsin.demo import pack

RGB = tuple[int, int, int]
Split = Literal["train", "test"]
Kind = Literal["shape", "pictogram", "text"]
TextKind = Literal["word", "number", "letters"]
Recipe = Literal["shapes", "count", "single", "pictograms", "name", "mixed", "text", "blank"]

COLORS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    # Ranges of hue in degrees, saturation and value.
    "red": ((-8, 7), (0.8, 1.0), (0.7, 1.0)),
    "orange": ((24, 35), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((51, 60), (0.7, 1.0), (0.9, 1.0)),
    "green": ((96, 145), (0.5, 1.0), (0.4, 0.9)),
    "teal": ((172, 184), (0.7, 1.0), (0.42, 0.6)),
    "cyan": ((178, 192), (0.6, 1.0), (0.85, 1.0)),
    "blue": ((212, 242), (0.7, 1.0), (0.6, 1.0)),
    "purple": ((268, 290), (0.5, 1.0), (0.45, 0.85)),
    "pink": ((322, 346), (0.28, 0.65), (0.95, 1.0)),
    "brown": ((18, 30), (0.55, 0.85), (0.35, 0.55)),
    "black": ((0, 360), (0.0, 0.1), (0.0, 0.12)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
    "gray": ((0, 360), (0.0, 0.06), (0.42, 0.64)),
}
COLOR_NAMES = tuple(COLORS)

SHAPES = (
    "circle",
    "oval",
    "square",
    "rectangle",
    "triangle",
    "diamond",
    "pentagon",
    "hexagon",
    "star",
    "heart",
    "cross",
    "arrow",
)
DIRECTIONS = ("right", "down", "left", "up")
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

TRAINING_BACKGROUNDS = ("plain", "named", "gradient", "noise", "stripes", "grid", "blobs")
HELD_OUT_BACKGROUNDS = ("dots", "checker", "radial")

TEXT_KINDS: tuple[TextKind, ...] = ("word", "number", "letters")

MOST_THINGS = 9
"""Things in a scene, at most: the counts that training can teach."""

MAX_SIDE = 768
"""Longest side in pixels that a scene may have."""

GRID = 16
"""Patches per side that the model sees: the resolution of :func:`label_grid`."""


def is_held_out_combination(shape: str, color: str) -> bool:
    """Say whether this colour of this shape is kept for the test."""
    return (3 * SHAPES.index(shape) + 5 * COLOR_NAMES.index(color)) % 6 == 0


def is_held_out_pair(first: int, second: int) -> bool:
    """Say whether these two pictograms, by index, are kept for the test as a pair."""
    return first != second and (first + second) % 7 == 0


@dataclass(slots=True, kw_only=True)
class Thing:
    """One thing of a scene; ``x``, ``y`` is its centre, ``w``, ``h`` its extent, as fractions of the picture."""

    kind: Kind
    name: str
    """The shape's or the pictogram's name, or the printed text."""
    color: str | None = None
    x: float = 0.5
    y: float = 0.5
    w: float = 0.2
    h: float = 0.2
    rgb: RGB = (0, 0, 0)
    angle: float = 0.0
    """Degrees, counter-clockwise. An arrow's also holds its direction."""
    direction: str | None = None
    style: str = "fill"
    """Shapes: fill, outline or bordered. Pictograms: the icon set. Text: the font."""
    variant: int = 0
    stretch: float = 1.0
    """Width over height in pixels."""
    countable: bool = True
    category: str | None = None
    index: int = -1
    """Pictograms: index in the pack."""
    stroke: float = 0.03
    wobble: int = 0
    """Seed of a hand-drawn outline; 0 draws it straight."""

    @property
    def area(self) -> float:
        """Extent as a fraction of the picture's area."""
        return self.w * self.h


@dataclass(slots=True, kw_only=True)
class Background:
    """What lies behind the things; ``color`` is set when it has one plain nameable colour."""

    family: str
    colors: tuple[RGB, ...]
    color: str | None = None
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class Scene:
    """Things on a background, with the picture's size in pixels and its degradations."""

    things: list[Thing]
    background: Background
    width: int
    height: int
    recipe: Recipe
    smooth: bool = True
    jpeg_quality: int = 0
    """0 keeps the picture as drawn."""
    noise: float = 0.0
    """Standard deviation in grey levels."""
    seed: int = 0
    text_kind: TextKind | None = None
    """What the print is, where there is any."""


def random_rgb(rng: random.Random, color: str) -> RGB:
    """Draw one shade of a named colour."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in COLORS[color])
    red, green, blue = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def color_distance(first: RGB, second: RGB) -> float:
    """Return how far two colours are apart; 0 to 765, weighted roughly as eyes weigh the channels."""
    weights = (0.8, 1.3, 0.9)
    return sum(weight * abs(a - b) for weight, a, b in zip(weights, first, second, strict=True))


def sample_background(rng: random.Random, split: Split, *, plain: bool = False) -> Background:
    """Draw a background; ``plain`` leaves out patterns that would hide small print."""
    if split == "test" and not plain and rng.random() < 0.75:
        family = rng.choice(HELD_OUT_BACKGROUNDS)
    else:
        family = rng.choices(TRAINING_BACKGROUNDS, (34, 16, 12, 10, 7, 6, 10))[0]
    if plain and family in ("stripes", "grid"):
        family = "gradient"
    seed = rng.getrandbits(31)
    if family == "named":
        color = rng.choice(COLOR_NAMES)
        return Background(family=family, colors=(random_rgb(rng, color),), color=color, seed=seed)
    if family == "plain" and rng.random() < 0.55:
        level = rng.choice((255, 255, 255, rng.randint(243, 255)))
        return Background(family=family, colors=((level, level, level),), color="white", seed=seed)

    def shade() -> RGB:
        if tone < 0.75:
            saturation, value = rng.uniform(0.03, 0.3), rng.uniform(0.82, 1.0)
        elif tone < 0.9:
            saturation, value = rng.uniform(0.1, 0.6), rng.uniform(0.08, 0.3)
        else:
            saturation, value = rng.uniform(0.1, 0.6), rng.uniform(0.3, 0.85)
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, value)
        return round(255 * red), round(255 * green), round(255 * blue)

    tone = rng.random()
    first = shade()
    if family in ("plain", "noise"):
        return Background(family=family, colors=(first,), seed=seed)
    second = shade()
    if family != "gradient":
        # Patterns stay close in tone: what stands on them must stand out.
        second = _halfway(first, second)
    return Background(family=family, colors=(first, second), seed=seed)


def _halfway(first: RGB, second: RGB) -> RGB:
    red, green, blue = (round(a + 0.5 * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _visible(rgb: RGB, background: Background, least: float = 150.0) -> bool:
    return all(color_distance(rgb, other) >= least for other in background.colors)


def sample_color(rng: random.Random, background: Background, allowed: tuple[str, ...] = COLOR_NAMES) -> str | None:
    """Draw a colour name that stands out from the background, or None when none of ``allowed`` does."""
    for _ in range(12):
        color = rng.choice(allowed)
        if color != background.color and _visible(random_rgb(rng, color), background):
            return color
    return None


def shade_for(rng: random.Random, color: str, background: Background) -> RGB:
    """Draw a shade of ``color`` that stands out from the background."""
    rgb = random_rgb(rng, color)
    for _ in range(7):
        if _visible(rgb, background, 130.0):
            break
        rgb = random_rgb(rng, color)
    return rgb


def _place(rng: random.Random, things: list[Thing], *, gap: float = 0.02) -> list[Thing]:
    """Give every thing a free place, in order; those that find none are left out."""
    placed: list[Thing] = []
    for thing in things:
        half_w, half_h = thing.w / 2, thing.h / 2
        for _ in range(40):
            x = rng.uniform(half_w + 0.01, 0.99 - half_w)
            y = rng.uniform(half_h + 0.01, 0.99 - half_h)
            if any(abs(centre - line) < 0.025 for centre in (x, y) for line in (1 / 3, 2 / 3)):
                # On the line between two places no answer to "where" would be right.
                continue
            if all(
                abs(x - other.x) >= half_w + other.w / 2 + gap or abs(y - other.y) >= half_h + other.h / 2 + gap
                for other in placed
            ):
                thing.x, thing.y = x, y
                placed.append(thing)
                break
    return placed


def make_shape(rng: random.Random, name: str, color: str, size: float, aspect: float, background: Background) -> Thing:
    """Make a shape whose larger side is about ``size`` of the picture's shorter; ``aspect`` is width over height."""
    angle, stretch, direction = rng.uniform(-10, 10), 1.0, None
    if name in ("rectangle", "oval"):
        # Elongated enough to stay so when the picture is stretched to a square, which divides the ratio by ``aspect``.
        stretch = rng.uniform(1.9, 3.0)
        lying, standing = stretch / aspect >= 1.55, stretch * aspect >= 1.55
        if not lying or (standing and rng.random() < 0.5):
            stretch = 1 / stretch
        angle *= 0.6
    elif name == "diamond":
        stretch = rng.uniform(0.62, 1.05)
        angle *= 0.5
    elif name in ("triangle", "heart", "star", "pentagon", "hexagon"):
        stretch = rng.uniform(0.85, 1.18)
    elif name == "cross":
        angle *= 0.6
    elif name == "arrow":
        direction = rng.choice(DIRECTIONS)
        stretch = rng.uniform(1.2, 1.9)
        if direction in ("up", "down"):
            stretch = 1 / stretch
    if name == "triangle" and rng.random() < 0.15:
        angle += rng.uniform(-180, 180)
    width_px, height_px = (size, size / stretch) if stretch >= 1 else (size * stretch, size)
    spin = 0.0 if name == "circle" else math.radians(abs(angle))
    grow = 1 + 0.35 * min(abs(math.sin(spin)), 0.5)
    # ``size`` is in units of the shorter side of the picture.
    short_w, short_h = (1 / aspect, 1.0) if aspect >= 1 else (1.0, aspect)
    draw = rng.random()
    style = "fill" if draw < 0.6 else "outline" if draw < 0.82 else "bordered"
    if size < 0.13 and style == "outline":
        style = "fill"
    return Thing(
        kind="shape",
        name=name,
        color=color,
        w=width_px * grow * short_w,
        h=height_px * grow * short_h,
        rgb=shade_for(rng, color, background),
        angle=angle,
        direction=direction,
        style=style,
        stretch=stretch,
        stroke=rng.uniform(0.022, 0.05),
        wobble=rng.getrandbits(20) if style == "outline" and rng.random() < 0.5 else 0,
    )


def make_pictogram(
    rng: random.Random, thing: pack.Pictogram, size: float, aspect: float, styles: tuple[str, ...]
) -> Thing:
    """Make a pictogram in one of ``styles`` (those that lack it are passed over)."""
    usable = [style for style in styles if style in thing.tiles]
    style = rng.choice(usable or list(thing.tiles))
    short_w, short_h = (1 / aspect, 1.0) if aspect >= 1 else (1.0, aspect)
    return Thing(
        kind="pictogram",
        name=thing.name,
        w=size * short_w,
        h=size * short_h,
        angle=rng.gauss(0, 7) if rng.random() < 0.4 else 0.0,
        style=style,
        variant=rng.randrange(len(thing.tiles[style])),
        countable=thing.countable,
        category=thing.category,
        index=thing.index,
    )


def _random_letters(rng: random.Random) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 7)))


def sample_text(rng: random.Random, split: Split, text_kind: TextKind) -> str:
    """Draw a word, a number of 1 to 5 digits, or 3 to 7 random letters, from this side of the split."""
    held_out = split == "test"
    if text_kind == "number":
        while True:
            digits = rng.choice((1, 2, 2, 3, 3, 4, 5))
            number = str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
            if pack.is_held_out_text(number) == held_out:
                return number
    if text_kind == "word":
        text = rng.choice(pack.words(held_out=held_out))
    else:
        while True:
            text = _random_letters(rng)
            if pack.is_held_out_text(text) == held_out:
                break
    return rng.choice((text, text.upper(), text.upper(), text.capitalize()))


def make_text(
    rng: random.Random, text: str, split: Split, aspect: float, background: Background, room: tuple[float, float]
) -> Thing:
    """Make a line of print that fits ``room``, the width and height left to it as fractions of the picture."""
    held_out = split == "test"
    name = rng.choice(list(pack.fonts(held_out=held_out)))
    measure = pack.font(name, 64, held_out=held_out)
    left, top, right, bottom = measure.getbbox(text)
    ratio = (right - left) / max(1, bottom - top) / aspect
    # At least about nine of the 128 pixels that the model sees for each letter, where the room allows it.
    least = min(room[0], 0.072 * len(text))
    width = rng.uniform(least, room[0])
    height = width / ratio
    if height > room[1]:
        width, height = width * room[1] / height, room[1]
    if rng.random() < 0.3 and background.color != "black" and _visible((0, 0, 0), background):
        color = "black"
    else:
        color = sample_color(rng, background) or ("black" if sum(background.colors[0]) > 380 else "white")
    return Thing(
        kind="text",
        name=text,
        color=color,
        w=width,
        h=height,
        rgb=shade_for(rng, color, background),
        angle=rng.gauss(0, 4) if rng.random() < 0.35 and width < 0.85 * room[0] else 0.0,
        style=name,
        stretch=(right - left) / max(1, bottom - top),
    )


RECIPES: tuple[Recipe, ...] = ("shapes", "count", "single", "pictograms", "name", "mixed", "text", "blank")
RECIPE_WEIGHTS = (24, 12, 6, 17, 14, 9, 22, 1)


@dataclass(slots=True, kw_only=True)
class _Sampler:
    """Draws the things of one scene; one method per recipe."""

    rng: random.Random
    split: Split
    aspect: float
    """Width over height of the picture."""
    background: Background
    styles: tuple[str, ...]
    only: str | None
    text_kind: TextKind | None
    """What print to draw; afterwards, what was drawn."""

    def shape_pairs(self, count: int) -> list[tuple[str, str]]:
        """Draw shapes and colours; the test's first pair is one that training never shows."""
        pairs: list[tuple[str, str]] = []
        for _ in range(20 * count):
            if len(pairs) == count:
                break
            color = sample_color(self.rng, self.background)
            if color is None:
                continue
            shape = self.rng.choice(SHAPES)
            held_out = is_held_out_combination(shape, color)
            if held_out == (self.split == "test") or (self.split == "test" and pairs):
                pairs.append((shape, color))
        return pairs

    def pictogram_set(self, count: int) -> list[pack.Pictogram]:
        """Draw different pictograms; the test's first two are a pair that training never shows."""
        things = list(pack.pictograms().things)
        chosen: list[pack.Pictogram] = []
        while len(chosen) < count:
            pool = things
            if chosen and self.rng.random() < 0.25:
                # Company of the same category makes naming it harder.
                pool = [thing for thing in things if thing.category == chosen[0].category]
            thing = self.rng.choice(pool)
            if any(thing.index == other.index for other in chosen):
                continue
            clash = any(is_held_out_pair(thing.index, other.index) for other in chosen)
            if self.split == "train" and clash:
                continue
            if self.split == "test" and len(chosen) == 1 and not clash:
                thing = self.rng.choice([other for other in things if is_held_out_pair(chosen[0].index, other.index)])
            chosen.append(thing)
        return chosen

    def shape(self, name: str, color: str, size: float) -> Thing:
        """Make a shape of this scene."""
        return make_shape(self.rng, name, color, size, self.aspect, self.background)

    def shapes(self) -> list[Thing]:
        """Draw two to six shapes."""
        count = self.rng.choice((2, 2, 3, 3, 4, 5, 6))
        largest = {2: 0.42, 3: 0.36, 4: 0.31, 5: 0.28, 6: 0.26}[count]
        things = [self.shape(shape, color, self.rng.uniform(0.13, largest)) for shape, color in self.shape_pairs(count)]
        return _place(self.rng, sorted(things, key=lambda thing: -thing.area))

    def count(self) -> list[Thing]:
        """Draw up to nine shapes of few kinds."""
        kinds = self.shape_pairs(self.rng.choice((1, 2, 2, 3)))
        if self.rng.random() < 0.4 and len(kinds) > 1:
            # One shape in several colours, or one colour in several shapes, so that both words matter.
            shape, color = kinds[0]
            extra = self.rng.choice([(shape, kinds[1][1]), (kinds[1][0], color)])
            if self.split == "test" or not is_held_out_combination(*extra):
                kinds[1] = extra
        total = self.rng.randint(2, MOST_THINGS)
        size = self.rng.uniform(0.11, min(0.3, 0.72 / math.sqrt(total)))
        things = []
        for number in range(total if kinds else 0):
            shape, color = kinds[number] if number < len(kinds) else self.rng.choice(kinds)
            scale = size * (1 if self.rng.random() < 0.5 else self.rng.uniform(0.85, 1.25))
            things.append(self.shape(shape, color, max(0.1, scale)))
        return _place(self.rng, things)

    def single(self) -> list[Thing]:
        """Draw one shape."""
        things = [self.shape(shape, color, self.rng.uniform(0.25, 0.88)) for shape, color in self.shape_pairs(1)]
        return _place(self.rng, things)

    def name(self) -> list[Thing]:
        """Draw one pictogram."""
        thing = self.rng.choice([thing for thing in pack.pictograms().things if self.only in (None, thing.name)])
        large = self.rng.random() < 0.7
        size = self.rng.uniform(0.4, 0.97) if large else self.rng.uniform(0.22, 0.45)
        return _place(self.rng, [make_pictogram(self.rng, thing, size, self.aspect, self.styles)])

    def pictograms(self) -> list[Thing]:
        """Draw two to six different pictograms, some of them several times."""
        count = self.rng.choice((2, 2, 3, 3, 4, 5, 6))
        chosen = self.pictogram_set(count)
        largest = {2: 0.46, 3: 0.4, 4: 0.36, 5: 0.32, 6: 0.3}[count]
        styles = (self.rng.choice(self.styles),) if self.rng.random() < 0.6 else self.styles
        same_size = self.rng.uniform(0.2, largest) if self.rng.random() < 0.4 else 0.0
        things = []
        for thing in chosen:
            repeats = self.rng.choice((2, 3, 4)) if count <= 3 and thing.countable and self.rng.random() < 0.25 else 1
            for _ in range(repeats):
                size = same_size or self.rng.uniform(0.2, largest)
                size = min(size, 0.28) if repeats > 1 else size
                things.append(make_pictogram(self.rng, thing, size, self.aspect, styles))
        return _place(self.rng, sorted(things, key=lambda thing: -thing.area), gap=0.01)

    def mixed(self) -> list[Thing]:
        """Draw shapes, pictograms and, one time in three, a word or a number."""
        things = [
            self.shape(shape, color, self.rng.uniform(0.14, 0.3))
            for shape, color in self.shape_pairs(self.rng.choice((1, 2, 2, 3)))
        ]
        for thing in self.pictogram_set(self.rng.choice((1, 1, 2))):
            size = self.rng.uniform(0.22, 0.36)
            things.append(make_pictogram(self.rng, thing, size, self.aspect, self.styles))
        if self.rng.random() < 0.35:
            self.text_kind = self.text_kind or self.rng.choice(("word", "number"))
            text = sample_text(self.rng, self.split, self.text_kind)[:6]
            if self.text_kind == "word" and pack.is_held_out_text(text) != (self.split == "test"):
                # Cut short, the word fell on the other side of the split.
                self.text_kind = "number"
                text = sample_text(self.rng, self.split, "number")
            room = (0.62, 0.22)
            things.insert(0, make_text(self.rng, text, self.split, self.aspect, self.background, room))
        return _place(self.rng, things)

    def text(self) -> list[Thing]:
        """Draw one or two lines of print."""
        self.text_kind = self.text_kind or self.rng.choices(TEXT_KINDS, (45, 25, 30))[0]
        lines = 2 if self.rng.random() < (0.2 if self.text_kind == "word" else 0.08) else 1
        room = (0.96, 0.7) if lines == 1 else (0.94, 0.36)
        things = []
        for line in range(lines):
            text = sample_text(self.rng, self.split, self.text_kind)
            thing = make_text(self.rng, text, self.split, self.aspect, self.background, room)
            if lines == 2:
                thing.angle = 0.0
            half = thing.w / 2
            thing.x = self.rng.uniform(half + 0.01, max(half + 0.011, 0.99 - half))
            middle, reach = (0.5, 0.48) if lines == 1 else (0.27 + 0.46 * line, 0.22)
            slack = max(0.0, reach - thing.h / 2)
            thing.y = middle + self.rng.uniform(-slack, slack)
            things.append(thing)
        return things

    def blank(self) -> list[Thing]:
        """Draw nothing."""
        return []


def sample_scene(
    rng: random.Random,
    split: Split,
    recipe: Recipe | None = None,
    *,
    styles: tuple[str, ...] | None = None,
    text_kind: TextKind | None = None,
    only: str | None = None,
    weights: tuple[float, ...] = RECIPE_WEIGHTS,
) -> Scene:
    """Draw a scene at random.

    Args:
        rng: the only source of chance, so that one seed gives one scene.
        split: "test" uses what training never draws, in every scene that can hold it.
        recipe: the family of scene; None draws one.
        styles: icon sets to draw from; None takes the training ones.
        text_kind: the print of text scenes; None draws one.
        only: for the recipe "name", the pictogram to show; None draws one.
        weights: how often each of ``RECIPES`` is drawn.
    """
    recipe = recipe or rng.choices(RECIPES, weights)[0]
    aspect = 1.0 if rng.random() < 0.3 else math.exp(rng.uniform(math.log(0.75), math.log(4 / 3)))
    if recipe == "text":
        aspect = math.exp(rng.uniform(math.log(0.8), math.log(2.2)))
    side = rng.choices((rng.uniform(80, 128), rng.uniform(128, 224), rng.uniform(224, 384)), (20, 55, 25))[0]
    width, height = round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
    sampler = _Sampler(
        rng=rng,
        split=split,
        aspect=width / height,
        background=sample_background(rng, split, plain=recipe == "text"),
        styles=styles or pack.pictograms().training_styles,
        only=only,
        text_kind=text_kind,
    )
    things: list[Thing] = getattr(sampler, recipe)()[:MOST_THINGS]
    has_text = any(thing.kind == "text" for thing in things)
    compressed = rng.random() >= 0.6
    return Scene(
        things=things,
        background=sampler.background,
        width=width,
        height=height,
        recipe=recipe,
        smooth=rng.random() < 0.6,
        jpeg_quality=rng.randint(35, 92) if compressed else 0,
        noise=0.0 if rng.random() < 0.6 else rng.uniform(2, 14),
        seed=rng.getrandbits(31),
        text_kind=sampler.text_kind if has_text else None,
    )


# Drawing -------------------------------------------------------------------------------------------------------------


@cache
def _outline(name: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape in a box from -1 to 1, y downwards."""

    def polygon(corners: int, start: float) -> list[tuple[float, float]]:
        return [
            (math.cos(start + 2 * math.pi * k / corners), math.sin(start + 2 * math.pi * k / corners))
            for k in range(corners)
        ]

    if name in ("circle", "oval"):
        points = polygon(40, 0.0)
    elif name in ("square", "rectangle"):
        points = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif name == "triangle":
        points = [(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif name == "diamond":
        points = [(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)]
    elif name == "pentagon":
        points = polygon(5, -math.pi / 2)
    elif name == "hexagon":
        points = polygon(6, 0.0)
    elif name == "star":
        outer, inner = polygon(5, -math.pi / 2), polygon(5, -math.pi / 2 + math.pi / 5)
        points = [p for a, b in zip(outer, inner, strict=True) for p in (a, (0.42 * b[0], 0.42 * b[1]))]
    elif name == "heart":
        points = []
        for k in range(40):
            t = 2 * math.pi * k / 40
            points.append(
                (
                    math.sin(t) ** 3,
                    -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
                )
            )
    elif name == "cross":
        a = 0.34
        points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a)]
        points.append((-a, -a))
    elif name == "arrow":
        points = [(-1, -0.38), (0.1, -0.38), (0.1, -1), (1, 0), (0.1, 1), (0.1, 0.38), (-1, 0.38)]
    else:
        raise ValueError(f"unknown shape {name!r}")
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    mid_x, mid_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    half_x, half_y = (max(xs) - min(xs)) / 2, (max(ys) - min(ys)) / 2
    return tuple(((x - mid_x) / half_x, (y - mid_y) / half_y) for x, y in points)


def _shape_points(thing: Thing, width: int, height: int) -> list[tuple[float, float]]:
    """Corners of a shape in pixels."""
    points = _outline(thing.name)
    box_w, box_h = thing.w * width, thing.h * height
    if thing.name == "arrow":
        turns = DIRECTIONS.index(thing.direction or "right")
        for _ in range(turns):
            points = tuple((-y, x) for x, y in points)
    if thing.name == "circle":
        half_w = half_h = min(box_w, box_h) / 2
    else:
        # The largest box of this stretch that stays inside the extent once turned.
        half_h = min(box_h, box_w / thing.stretch) / 2
        half_w = half_h * thing.stretch
        spin = math.radians(abs(thing.angle))
        shrink = 1 + 0.35 * min(abs(math.sin(spin)), 0.5)
        half_w, half_h = half_w / shrink, half_h / shrink
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    cx, cy = thing.x * width, thing.y * height
    result = []
    for x, y in points:
        px, py = x * half_w, y * half_h
        result.append((cx + cos * px + sin * py, cy - sin * px + cos * py))
    return result


def _wobbly(points: list[tuple[float, float]], seed: int, amount: float) -> list[tuple[float, float]]:
    """Subdivide a closed line and push its points about, as a hand would."""
    rng = random.Random(seed)
    result = []
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        steps = 1 if len(points) > 20 else 4
        for k in range(steps):
            t = k / steps
            jitter_x, jitter_y = rng.gauss(0, amount), rng.gauss(0, amount)
            result.append((x0 + t * (x1 - x0) + jitter_x, y0 + t * (y1 - y0) + jitter_y))
    return result


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, width: int, height: int) -> None:
    points = _shape_points(thing, width, height)
    size = min(thing.w * width, thing.h * height)
    if thing.style == "outline":
        if thing.wobble:
            points = _wobbly(points, thing.wobble, 0.012 * size)
        stroke = max(2, round(thing.stroke * min(width, height)))
        draw.line([*points, points[0], points[1]], fill=thing.rgb, width=stroke, joint="curve")
        return
    draw.polygon(points, fill=thing.rgb)
    if thing.style == "bordered":
        dark = (20, 20, 20) if sum(thing.rgb) > 150 else (235, 235, 235)
        stroke = max(1, round(0.25 * thing.stroke * min(width, height)))
        draw.line([*points, points[0], points[1]], fill=dark, width=stroke, joint="curve")


def _draw_pictogram(canvas: Image.Image, thing: Thing) -> None:
    tile = pack.pictograms().things[thing.index].tiles[thing.style][thing.variant]
    box = max(4, round(thing.w * canvas.width)), max(4, round(thing.h * canvas.height))
    if thing.angle:
        tile = tile.rotate(thing.angle, Image.Resampling.BILINEAR)
    tile = tile.resize(box, Image.Resampling.BILINEAR)
    corner = round(thing.x * canvas.width - box[0] / 2), round(thing.y * canvas.height - box[1] / 2)
    canvas.paste(tile, corner, tile)


def _font_of(thing: Thing, size: int):
    held_out = thing.style in pack.fonts(held_out=True)
    return pack.font(thing.style, size, held_out=held_out)


def _draw_text(canvas: Image.Image, thing: Thing) -> None:
    box_w, box_h = thing.w * canvas.width, thing.h * canvas.height
    left, top, right, bottom = _font_of(thing, 64).getbbox(thing.name)
    scale = min(box_w / max(1, right - left), box_h / max(1, bottom - top))
    spin = abs(math.sin(math.radians(thing.angle)))
    size = max(6, int(64 * scale / (1 + spin)))
    font = _font_of(thing, size)
    left, top, right, bottom = font.getbbox(thing.name)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2), 0)
    ImageDraw.Draw(mask).text((1 - left, 1 - top), thing.name, fill=255, font=font)
    if thing.angle:
        mask = mask.rotate(thing.angle, Image.Resampling.BILINEAR, expand=True)
    corner = round(thing.x * canvas.width - mask.width / 2), round(thing.y * canvas.height - mask.height / 2)
    canvas.paste(thing.rgb, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)


@cache
def _noise_bank() -> np.ndarray:
    """Unit Gaussian noise, laid out so that cutting a window out of it is far cheaper than drawing afresh."""
    side = MAX_SIDE + 128
    return np.random.default_rng(7).standard_normal((side, side, 3), dtype=np.float32)


def _noise_window(rng: random.Random, height: int, width: int) -> np.ndarray:
    bank = _noise_bank()
    top, left = rng.randint(0, len(bank) - height), rng.randint(0, len(bank) - width)
    return bank[top : top + height, left : left + width]


def draw_background(background: Background, width: int, height: int) -> Image.Image:
    """Draw a background of this size, at most ``MAX_SIDE`` pixels a side."""
    rng = random.Random(background.seed)
    first = background.colors[0]
    second = background.colors[-1]
    family = background.family
    if family in ("plain", "named"):
        return Image.new("RGB", (width, height), first)
    if family == "noise":
        strength = rng.uniform(6, 16)
        pixels = np.asarray(first, dtype=np.float32) + strength * _noise_window(rng, height, width)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if family == "gradient":
        corners = [first, second, *((a, b)[rng.random() < 0.5] for a, b in [(first, second)] * 2)]
        rng.shuffle(corners)
        small = Image.new("RGB", (2, 2))
        small.putdata(corners)
        return small.resize((width, height), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    if family == "blobs":
        cells = rng.randint(3, 7)
        mix = np.random.default_rng(background.seed).random((cells, cells, 1), dtype=np.float32)
        pixels = np.asarray(first, dtype=np.float32) * (1 - mix) + np.asarray(second, dtype=np.float32) * mix
        return Image.fromarray(pixels.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (width, height), first)
    draw = ImageDraw.Draw(canvas)
    step = max(4, round(min(width, height) * rng.uniform(0.05, 0.16)))
    if family == "stripes":
        thickness = max(1, round(step * rng.uniform(0.3, 0.5)))
        slant = rng.choice((0, 0, height, -height))
        upright = rng.random() < 0.5 or slant != 0
        reach = width + height if upright else height
        for offset in range(-height if upright else 0, reach, step):
            ends = [(offset, 0), (offset + slant, height)] if upright else [(0, offset), (width, offset)]
            draw.line(ends, fill=second, width=thickness)
    elif family == "grid":
        for offset in range(0, max(width, height), step):
            draw.line([(offset, 0), (offset, height)], fill=second)
            draw.line([(0, offset), (width, offset)], fill=second)
    elif family == "dots":
        radius = step * rng.uniform(0.15, 0.3)
        for row, y in enumerate(range(0, height + step, step)):
            for x in range(-(row % 2) * step // 2, width + step, step):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)
    elif family == "checker":
        for row, y in enumerate(range(0, height, step)):
            for x in range((row % 2) * step, width, 2 * step):
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=second)
    elif family == "radial":
        rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None] - rng.uniform(-0.4, 0.4)
        columns = np.linspace(-1, 1, width, dtype=np.float32)[None] - rng.uniform(-0.4, 0.4)
        mix = np.sqrt(rows**2 + columns**2).clip(0, 1)[..., None]
        pixels = np.asarray(first, dtype=np.float32) * (1 - mix) + np.asarray(second, dtype=np.float32) * mix
        return Image.fromarray(pixels.astype(np.uint8))
    else:
        raise ValueError(f"unknown background {family!r}")
    return canvas


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB picture of ``scene.width`` by ``scene.height`` pixels."""
    width, height = scene.width, scene.height
    # Shapes are polygons without antialiasing; drawn twice as large and reduced they get it.
    factor = 2 if scene.smooth and max(width, height) <= 320 and any(t.kind == "shape" for t in scene.things) else 1
    canvas = draw_background(scene.background, width, height)
    if factor == 2:
        canvas = canvas.resize((2 * width, 2 * height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        if thing.kind == "shape":
            _draw_shape(draw, thing, factor * width, factor * height)
        elif thing.kind == "pictogram":
            _draw_pictogram(canvas, thing)
        else:
            _draw_text(canvas, thing)
    if factor == 2:
        canvas = canvas.reduce(2)
    if scene.noise:
        pixels = np.asarray(canvas, dtype=np.float32)
        pixels = pixels + scene.noise * _noise_window(random.Random(scene.seed), height, width)
        canvas = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if scene.jpeg_quality:
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=scene.jpeg_quality)
        canvas = Image.open(buffer).convert("RGB")
    return canvas


def num_labels() -> int:
    """Return how many values :func:`label_grid` can hold in its first map."""
    return 1 + len(SHAPES) + len(CHARACTERS) + len(pack.pictograms().things)


_CENTRES = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID


def label_grid(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Say what each patch of the picture shows: extra supervision for the vision tower in training.

    Returns:
        Two arrays (GRID, GRID): which shape, character or pictogram (int16, 0 is background), and which colour
        (uint8, 0 is none, otherwise 1 plus the index in ``COLOR_NAMES``).
    """
    what = np.zeros((GRID, GRID), dtype=np.int16)
    color = np.zeros((GRID, GRID), dtype=np.uint8)
    for thing in scene.things:
        if thing.kind == "text":
            _label_text(scene, thing, what, color)
            continue
        half_w, half_h = 0.42 * thing.w, 0.42 * thing.h
        rows = np.abs(_CENTRES - thing.y) <= max(half_h, 0.5 / GRID)
        columns = np.abs(_CENTRES - thing.x) <= max(half_w, 0.5 / GRID)
        inside = np.ix_(rows, columns)
        if thing.kind == "shape":
            what[inside] = 1 + SHAPES.index(thing.name)
            color[inside] = 1 + COLOR_NAMES.index(thing.color or "black")
        else:
            what[inside] = 1 + len(SHAPES) + len(CHARACTERS) + thing.index
    return what, color


def _label_text(scene: Scene, thing: Thing, what: np.ndarray, color: np.ndarray) -> None:
    font = _font_of(thing, 64)
    left, top, right, bottom = font.getbbox(thing.name)
    edges = np.asarray([font.getlength(thing.name[:k]) for k in range(len(thing.name) + 1)], dtype=np.float32)
    edges[0], edges[-1] = left, right
    scale = min(
        thing.w * scene.width / max(1, right - left),
        thing.h * scene.height / max(1, bottom - top),
    ) / (1 + abs(math.sin(math.radians(thing.angle))))
    dx = (_CENTRES[None, :] - thing.x) * scene.width / scale
    dy = (_CENTRES[:, None] - thing.y) * scene.height / scale
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    along = cos * dx - sin * dy + (left + right) / 2
    across = sin * dx + cos * dy
    # Half a patch of grace, so that small print labels at least the patches it runs through.
    reach = max((bottom - top) / 2, 0.5 * scene.height / GRID / scale)
    inside = (along >= left) & (along < right) & (np.abs(across) <= reach)
    which = np.clip(np.searchsorted(edges, along, side="right") - 1, 0, len(thing.name) - 1)
    codes = np.asarray([1 + len(SHAPES) + CHARACTERS.index(letter) for letter in thing.name], dtype=np.int16)
    what[inside] = codes[which][inside]
    color[inside] = 1 + COLOR_NAMES.index(thing.color or "black")
