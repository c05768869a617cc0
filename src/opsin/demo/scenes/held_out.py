"""What the test draws and training never does.

Ten font families, one word or number in ten (both in :mod:`opsin.demo.pack`), and the rules below: one pair of shape
and colour in six, one pair of pictograms in seven, three kinds of background.
"""

from __future__ import annotations

from opsin.demo.scenes.colors import COLOR_NAMES
from opsin.demo.scenes.scene import SHAPES

HELD_OUT_BACKGROUNDS = ("dots", "checker", "radial")


def is_held_out_combination(shape: str, color: str) -> bool:
    """Say whether this colour of this shape is kept for the test."""
    return (3 * SHAPES.index(shape) + 5 * COLOR_NAMES.index(color)) % 6 == 0


def is_held_out_pair(first: int, second: int) -> bool:
    """Say whether these two pictograms, by index, are kept for the test as a pair."""
    return first != second and (first + second) % 7 == 0
