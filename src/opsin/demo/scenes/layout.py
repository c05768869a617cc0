"""Sizes and places of things within a picture."""

from __future__ import annotations

import random

from opsin.demo.scenes.scene import Thing


def shorter_side(aspect: float) -> tuple[float, float]:
    """Return the picture's shorter side as a fraction of its width and of its height; ``aspect`` is width over height.

    Things are sized in units of the shorter side, so that a circle stays round.
    """
    return (1 / aspect, 1.0) if aspect >= 1 else (1.0, aspect)


def place(rng: random.Random, things: list[Thing], *, gap: float = 0.02) -> list[Thing]:
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
