"""Pictograms: how one is made at random, and its drawing."""

from __future__ import annotations

import random

from PIL import Image

from opsin.demo import pack
from opsin.demo.scenes.layout import shorter_side
from opsin.demo.scenes.scene import Thing


def make_pictogram(
    rng: random.Random, thing: pack.Pictogram, size: float, aspect: float, styles: tuple[str, ...]
) -> Thing:
    """Make a pictogram in one of ``styles`` (those that lack it are passed over)."""
    usable = [style for style in styles if style in thing.tiles]
    style = rng.choice(usable or list(thing.tiles))
    short_w, short_h = shorter_side(aspect)
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


def draw_pictogram(canvas: Image.Image, thing: Thing) -> None:
    """Draw a pictogram onto a canvas."""
    tile = pack.pictograms().things[thing.index].tiles[thing.style][thing.variant]
    box = max(4, round(thing.w * canvas.width)), max(4, round(thing.h * canvas.height))
    if thing.angle:
        tile = tile.rotate(thing.angle, Image.Resampling.BILINEAR)
    tile = tile.resize(box, Image.Resampling.BILINEAR)
    corner = round(thing.x * canvas.width - box[0] / 2), round(thing.y * canvas.height - box[1] / 2)
    canvas.paste(tile, corner, tile)
