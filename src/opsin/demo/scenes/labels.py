"""What each patch of a picture shows: extra supervision for the vision tower in training."""

from __future__ import annotations

import math

import numpy as np

from opsin.demo import pack
from opsin.demo.scenes.colors import COLOR_NAMES
from opsin.demo.scenes.lettering import measure
from opsin.demo.scenes.scene import SHAPES, Scene, Thing

GRID = 16
"""Patches per side that the model sees."""

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""All that print is made of."""

_CENTRES = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID


def num_labels() -> int:
    """Return how many values :func:`label_grid` can hold in its first map."""
    return 1 + len(SHAPES) + len(CHARACTERS) + len(pack.pictograms().things)


def label_grid(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Say what each patch of the picture shows.

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
    """Label the patches that a line of print runs through with their letters, in place."""
    font, scale = measure(thing, scene.width, scene.height)
    left, top, right, bottom = font.getbbox(thing.name)
    edges = np.asarray([font.getlength(thing.name[:k]) for k in range(len(thing.name) + 1)], dtype=np.float32)
    edges[0], edges[-1] = left, right
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
