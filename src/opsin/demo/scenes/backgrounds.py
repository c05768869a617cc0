"""Backgrounds: how one is drawn at random, and how each family looks."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw

from opsin.demo.scenes.colors import COLOR_NAMES, from_hsv, random_rgb
from opsin.demo.scenes.held_out import HELD_OUT_BACKGROUNDS
from opsin.demo.scenes.noise import noise_window
from opsin.demo.scenes.scene import RGB, Background, Split

TRAINING_BACKGROUNDS = ("plain", "named", "gradient", "noise", "stripes", "grid", "blobs")
_WEIGHTS = (34, 16, 12, 10, 7, 6, 10)


def sample_background(rng: random.Random, split: Split, *, plain: bool = False) -> Background:
    """Draw a background; ``plain`` leaves out patterns that would hide small print."""
    if split == "test" and not plain and rng.random() < 0.75:
        family = rng.choice(HELD_OUT_BACKGROUNDS)
    else:
        family = rng.choices(TRAINING_BACKGROUNDS, _WEIGHTS)[0]
    if plain and family in ("stripes", "grid"):
        family = "gradient"
    seed = rng.getrandbits(31)
    if family == "named":
        color = rng.choice(COLOR_NAMES)
        return Background(family=family, colors=(random_rgb(rng, color),), color=color, seed=seed)
    if family == "plain" and rng.random() < 0.55:
        level = rng.choice((255, 255, 255, rng.randint(243, 255)))
        return Background(family=family, colors=((level, level, level),), color="white", seed=seed)
    tone = rng.random()
    first = _shade(rng, tone)
    if family in ("plain", "noise"):
        return Background(family=family, colors=(first,), seed=seed)
    second = _shade(rng, tone)
    if family != "gradient":
        # Patterns stay close in tone: what stands on them must stand out.
        second = _halfway(first, second)
    return Background(family=family, colors=(first, second), seed=seed)


def _shade(rng: random.Random, tone: float) -> RGB:
    """Draw a pale, a dark or a middling shade, as ``tone`` (0 to 1) has it."""
    if tone < 0.75:
        saturation, value = rng.uniform(0.03, 0.3), rng.uniform(0.82, 1.0)
    elif tone < 0.9:
        saturation, value = rng.uniform(0.1, 0.6), rng.uniform(0.08, 0.3)
    else:
        saturation, value = rng.uniform(0.1, 0.6), rng.uniform(0.3, 0.85)
    return from_hsv(rng.random(), saturation, value)


def _halfway(first: RGB, second: RGB) -> RGB:
    red, green, blue = (round(a + 0.5 * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def draw_background(background: Background, width: int, height: int) -> Image.Image:
    """Draw a background of this size, at most ``MAX_SIDE`` pixels a side."""
    rng = random.Random(background.seed)
    first, second, family = background.colors[0], background.colors[-1], background.family
    if family in ("plain", "named"):
        return Image.new("RGB", (width, height), first)
    if family == "noise":
        strength = rng.uniform(6, 16)
        pixels = np.asarray(first, dtype=np.float32) + strength * noise_window(rng, height, width)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if family == "gradient":
        corners = [first, second, *(second if rng.random() < 0.5 else first for _ in range(2))]
        rng.shuffle(corners)
        small = Image.new("RGB", (2, 2))
        small.putdata(corners)
        return small.resize((width, height), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    if family == "blobs":
        cells = rng.randint(3, 7)
        mix = np.random.default_rng(background.seed).random((cells, cells, 1), dtype=np.float32)
        return _blend(first, second, mix).resize((width, height), Image.Resampling.BICUBIC)
    # Radial has no step; drawing one all the same keeps the pictures that its seeds have always given.
    step = max(4, round(min(width, height) * rng.uniform(0.05, 0.16)))
    if family == "radial":
        rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None] - rng.uniform(-0.4, 0.4)
        columns = np.linspace(-1, 1, width, dtype=np.float32)[None] - rng.uniform(-0.4, 0.4)
        return _blend(first, second, np.sqrt(rows**2 + columns**2).clip(0, 1)[..., None])
    canvas = Image.new("RGB", (width, height), first)
    _draw_pattern(canvas, family, second, step, rng)
    return canvas


def _blend(first: RGB, second: RGB, mix: np.ndarray) -> Image.Image:
    """Mix two colours by a map (height, width, 1) of the second one's share."""
    pixels = np.asarray(first, dtype=np.float32) * (1 - mix) + np.asarray(second, dtype=np.float32) * mix
    return Image.fromarray(pixels.astype(np.uint8))


def _draw_pattern(canvas: Image.Image, family: str, color: RGB, step: int, rng: random.Random) -> None:
    """Draw a pattern of one colour that repeats every ``step`` pixels."""
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    if family == "stripes":
        thickness = max(1, round(step * rng.uniform(0.3, 0.5)))
        slant = rng.choice((0, 0, height, -height))
        upright = rng.random() < 0.5 or slant != 0
        reach = width + height if upright else height
        for offset in range(-height if upright else 0, reach, step):
            ends = [(offset, 0), (offset + slant, height)] if upright else [(0, offset), (width, offset)]
            draw.line(ends, fill=color, width=thickness)
    elif family == "grid":
        for offset in range(0, max(width, height), step):
            draw.line([(offset, 0), (offset, height)], fill=color)
            draw.line([(0, offset), (width, offset)], fill=color)
    elif family == "dots":
        radius = step * rng.uniform(0.15, 0.3)
        for row, y in enumerate(range(0, height + step, step)):
            for x in range(-(row % 2) * step // 2, width + step, step):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif family == "checker":
        for row, y in enumerate(range(0, height, step)):
            for x in range((row % 2) * step, width, 2 * step):
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=color)
    else:
        raise ValueError(f"unknown background {family!r}")
