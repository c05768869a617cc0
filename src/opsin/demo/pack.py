"""The demo model's drawing material: pictograms, fonts and words, read from ``opsin/demo/assets``.

Owns: decoding the packs once per process, and the fixed rules that split them into a training and a test part.
Refuses: anything about scenes or questions; see :mod:`opsin.demo.scenes`.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageFont

ASSETS = Path(__file__).resolve().parent / "assets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictogram:
    """One named everyday thing and the pictures that show it."""

    index: int
    name: str
    category: str
    countable: bool
    tiles: dict[str, tuple[Image.Image, ...]]
    """RGBA tiles by style."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictograms:
    """All pictograms, and which styles training may draw."""

    things: tuple[Pictogram, ...]
    training_styles: tuple[str, ...]
    held_out_styles: tuple[str, ...]


@cache
def pictograms() -> Pictograms:
    """Decode the atlases; about half a second, once per process."""
    table = json.loads((ASSETS / "pictograms.json").read_text(encoding="utf-8"))
    size, columns = table["tile"], table["columns"]
    tiles: list[dict[str, list[Image.Image]]] = [{} for _ in table["things"]]
    for style, indices in table["tiles"].items():
        atlas = Image.open(ASSETS / f"pictograms-{style}.webp").convert("RGBA")
        for position, index in enumerate(indices):
            row, column = divmod(position, columns)
            box = (column * size, row * size, (column + 1) * size, (row + 1) * size)
            tiles[index].setdefault(style, []).append(atlas.crop(box))
    things = tuple(
        Pictogram(
            index=index,
            name=thing["name"],
            category=thing["category"],
            countable=thing["countable"],
            tiles={style: tuple(pictures) for style, pictures in tiles[index].items()},
        )
        for index, thing in enumerate(table["things"])
    )
    return Pictograms(
        things=things,
        training_styles=tuple(table["training_styles"]),
        held_out_styles=tuple(table["held_out_styles"]),
    )


@cache
def fonts(*, held_out: bool) -> dict[str, bytes]:
    """Return the TrueType files of one side of the split, by name."""
    folder = "held_out/" if held_out else "train/"
    with zipfile.ZipFile(ASSETS / "fonts.zip") as archive:
        return {name.removeprefix(folder): archive.read(name) for name in archive.namelist() if name.startswith(folder)}


@lru_cache(maxsize=4096)
def font(name: str, size: int, *, held_out: bool) -> ImageFont.FreeTypeFont:
    """Return one font at ``size`` pixels."""
    return ImageFont.truetype(io.BytesIO(fonts(held_out=held_out)[name]), size, layout_engine=ImageFont.Layout.BASIC)


def is_held_out_text(text: str) -> bool:
    """Say whether a word or a number is kept for the test: one in ten, whatever its case."""
    return zlib.crc32(text.lower().encode()) % 10 == 0


@cache
def words(*, held_out: bool) -> tuple[str, ...]:
    """Return the lower-case words of one side of the split."""
    text = (ASSETS / "words.txt").read_text(encoding="utf-8")
    return tuple(word for word in text.split() if is_held_out_text(word) == held_out)
