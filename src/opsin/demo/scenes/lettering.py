"""Print: which text is drawn, how a line of it is made, and its drawing."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw, ImageFont

from opsin.demo import pack
from opsin.demo.scenes.colors import sample_color, shade_for, stands_out
from opsin.demo.scenes.scene import Background, Split, TextKind, Thing

_MEASURE = 64
"""Size in pixels at which print is measured."""


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
    left, top, right, bottom = pack.font(name, _MEASURE, held_out=held_out).getbbox(text)
    stretch = (right - left) / max(1, bottom - top)
    ratio = stretch / aspect
    # At least about nine of the 128 pixels that the model sees for each letter, where the room allows it.
    least = min(room[0], 0.072 * len(text))
    width = rng.uniform(least, room[0])
    height = width / ratio
    if height > room[1]:
        width, height = width * room[1] / height, room[1]
    if rng.random() < 0.3 and background.color != "black" and stands_out((0, 0, 0), background):
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
        stretch=stretch,
    )


def _font_of(thing: Thing, size: int) -> ImageFont.FreeTypeFont:
    return pack.font(thing.style, size, held_out=thing.style in pack.fonts(held_out=True))


def measure(thing: Thing, width: int, height: int) -> tuple[ImageFont.FreeTypeFont, float]:
    """Return the print's font at a fixed size, and the scale from there to a picture of ``width`` by ``height``."""
    font = _font_of(thing, _MEASURE)
    left, top, right, bottom = font.getbbox(thing.name)
    scale = min(thing.w * width / max(1, right - left), thing.h * height / max(1, bottom - top))
    return font, scale / (1 + abs(math.sin(math.radians(thing.angle))))


def draw_text(canvas: Image.Image, thing: Thing) -> None:
    """Draw a line of print onto a canvas."""
    _, scale = measure(thing, canvas.width, canvas.height)
    font = _font_of(thing, max(6, int(_MEASURE * scale)))
    left, top, right, bottom = font.getbbox(thing.name)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2), 0)
    ImageDraw.Draw(mask).text((1 - left, 1 - top), thing.name, fill=255, font=font)
    if thing.angle:
        mask = mask.rotate(thing.angle, Image.Resampling.BILINEAR, expand=True)
    corner = round(thing.x * canvas.width - mask.width / 2), round(thing.y * canvas.height - mask.height / 2)
    canvas.paste(thing.rgb, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
