"""Gaussian noise, cheap enough for every picture."""

from __future__ import annotations

import random
from functools import cache

import numpy as np

from opsin.demo.scenes.scene import MAX_SIDE


@cache
def _bank() -> np.ndarray:
    """Unit Gaussian noise, laid out so that cutting a window out of it is far cheaper than drawing afresh."""
    side = MAX_SIDE + 128
    return np.random.default_rng(7).standard_normal((side, side, 3), dtype=np.float32)


def noise_window(rng: random.Random, height: int, width: int) -> np.ndarray:
    """Cut a random window of unit noise, float32 (height, width, 3); at most ``MAX_SIDE`` a side."""
    bank = _bank()
    top, left = rng.randint(0, len(bank) - height), rng.randint(0, len(bank) - width)
    return bank[top : top + height, left : left + width]
