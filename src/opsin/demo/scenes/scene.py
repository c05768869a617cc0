"""What a scene holds: things on a background, and how the picture of them is spoilt. Data only.

All positions and sizes are fractions of the picture's width and height, because the model sees every picture
stretched to one square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RGB = tuple[int, int, int]
Split = Literal["train", "test"]
Kind = Literal["shape", "pictogram", "text"]
TextKind = Literal["word", "number", "letters"]
Recipe = Literal["shapes", "count", "single", "pictograms", "name", "mixed", "text", "blank"]

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
TEXT_KINDS: tuple[TextKind, ...] = ("word", "number", "letters")
RECIPES: tuple[Recipe, ...] = ("shapes", "count", "single", "pictograms", "name", "mixed", "text", "blank")
"""Families of scenes, told apart by what they hold; see :mod:`opsin.demo.scenes.recipes`."""

MOST_THINGS = 9
"""Things in a scene, at most: the counts that training can teach."""

MAX_SIDE = 768
"""Longest side in pixels that a scene may have."""


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
    """Degrees, counter-clockwise; for an arrow, away from its direction."""
    direction: str | None = None
    """Arrows: one of ``DIRECTIONS``."""
    style: str = "fill"
    """Shapes: fill, outline or bordered. Pictograms: the icon set. Text: the font."""
    variant: int = 0
    """Pictograms: which of the icon set's pictures."""
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

    @property
    def shapes(self) -> list[Thing]:
        """The shapes."""
        return [thing for thing in self.things if thing.kind == "shape"]

    @property
    def pictograms(self) -> list[Thing]:
        """The pictograms."""
        return [thing for thing in self.things if thing.kind == "pictogram"]

    @property
    def solid(self) -> list[Thing]:
        """The shapes and pictograms."""
        return [thing for thing in self.things if thing.kind != "text"]

    @property
    def texts(self) -> list[Thing]:
        """The lines of print, from the top."""
        return sorted((thing for thing in self.things if thing.kind == "text"), key=lambda thing: thing.y)
