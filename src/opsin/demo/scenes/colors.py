"""Named colours: their shades, and which of them stand out from a background."""

from __future__ import annotations

import colorsys
import random

from opsin.demo.scenes.scene import RGB, Background

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


def from_hsv(hue: float, saturation: float, value: float) -> RGB:
    """Convert from hue, saturation and value, each 0 to 1."""
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def random_rgb(rng: random.Random, color: str) -> RGB:
    """Draw one shade of a named colour."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in COLORS[color])
    return from_hsv((hue % 360) / 360, saturation, value)


def color_distance(first: RGB, second: RGB) -> float:
    """Return how far two colours are apart; 0 to 765, weighted roughly as eyes weigh the channels."""
    weights = (0.8, 1.3, 0.9)
    return sum(weight * abs(a - b) for weight, a, b in zip(weights, first, second, strict=True))


def stands_out(rgb: RGB, background: Background, least: float = 150.0) -> bool:
    """Say whether a colour is at least this far from all colours of a background."""
    return all(color_distance(rgb, other) >= least for other in background.colors)


def sample_color(rng: random.Random, background: Background) -> str | None:
    """Draw a colour name that stands out from the background, or None when twelve draws find none."""
    for _ in range(12):
        color = rng.choice(COLOR_NAMES)
        if color != background.color and stands_out(random_rgb(rng, color), background):
            return color
    return None


def shade_for(rng: random.Random, color: str, background: Background) -> RGB:
    """Draw a shade of ``color``, one that stands out from the background if eight draws find one."""
    rgb = random_rgb(rng, color)
    for _ in range(7):
        if stands_out(rgb, background, 130.0):
            break
        rgb = random_rgb(rng, color)
    return rgb
