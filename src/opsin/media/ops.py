"""Carry out a ``PixelPlan``: pure functions from an RGB picture to flat uint8 tiles.

The arithmetic is Pillow's 8-bit antialiased resampling, which is what the Pillow-backed Hugging Face processors
compute, bit for bit. Pillow's shortcuts (JPEG draft mode, ``reducing_gap``) are not used: they change pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from opsin.errors import MediaError
from opsin.media.decode import check_size
from opsin.types import Crop, Pad, PixelOp, PixelPlan, Resize

MAX_INTERMEDIATE_PIXELS = 2**26
"""A 1 x 100,000 picture, resized until its short edge is 336, would pass through 11 thousand million pixels."""

PixelArray = npt.NDArray[np.uint8]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def output_size(ops: Sequence[PixelOp], width: int, height: int) -> tuple[int, int]:
    """(width, height) after ``ops``.

    Raises:
        MediaError: ``image_too_small``: a resize to nothing, or one that grows past ``MAX_INTERMEDIATE_PIXELS``.
    """
    for op in ops:
        before = (width, height)
        if isinstance(op, Pad):
            width, height = width + op.left + op.right, height + op.top + op.bottom
        else:
            width, height = op.width, op.height
        grows = width * height > max(MAX_INTERMEDIATE_PIXELS, before[0] * before[1])
        if width < 1 or height < 1 or grows:
            raise MediaError(
                f"A picture of {before[0]} x {before[1]} pixels is too narrow: the model's processor would make "
                f"it {width} x {height}. Crop it, or pad it to a squarer shape.",
                code="image_too_small",
            )
    return width, height


def distinct(frames: Sequence[int]) -> list[int]:
    """A plan's frames without those that repeat the one before them."""
    return [frame for frame, _ in itertools.groupby(frames)]


def make_frames(pictures: Iterable[Image.Image], plan: PixelPlan, out: PixelArray) -> None:
    """Fill ``out``, flat uint8 of ``plan.num_bytes``, with the tiles of every frame of the plan.

    Args:
        pictures: of the plan's ``distinct`` frames.

    Raises:
        MediaError: ``image_parse_error``: one has not the size that the plan was made for.
    """
    parts = out.reshape(len(plan.frames), -1)
    supply = iter(pictures)
    for i, frame in enumerate(plan.frames):
        if i and frame == plan.frames[i - 1]:
            parts[i] = parts[i - 1]
        else:
            make_tiles(next(supply), plan, parts[i])


def make_tiles(picture: Image.Image, plan: PixelPlan, out: PixelArray) -> None:
    """Fill ``out``, flat uint8, with the tiles of every view of one picture, or of one frame.

    Raises:
        MediaError: ``image_parse_error``: the picture has not the size that the plan was made for.
    """
    assert picture.mode == "RGB", picture.mode
    check_size(picture, plan.width, plan.height)
    start = 0
    for view in plan.views:
        seen = picture
        for op in view.ops:
            seen = _apply(seen, op)
        grid = (view.rows, view.height, view.cols, view.width, 3)
        pixels = np.asarray(seen).reshape(grid)
        out[start : start + view.num_bytes].reshape(view.rows, view.cols, view.height, view.width, 3)[...] = (
            pixels.transpose(0, 2, 1, 3, 4)
        )
        start += view.num_bytes


def _apply(picture: Image.Image, op: PixelOp) -> Image.Image:
    match op:
        case Resize():
            return picture.resize((op.width, op.height), _RESAMPLING[op.resample])
        case Crop():
            return _on_canvas(picture, op.width, op.height, -op.left, -op.top, op.fill)
        case Pad():
            width, height = picture.width + op.left + op.right, picture.height + op.top + op.bottom
            return _on_canvas(picture, width, height, op.left, op.top, op.fill)


def _on_canvas(
    picture: Image.Image, width: int, height: int, left: int, top: int, fill: tuple[int, int, int]
) -> Image.Image:
    """Lay the picture on a ``width`` x ``height`` canvas with its corner at (left, top), which may lie outside."""
    inside = left <= 0 and top <= 0 and left + picture.width >= width and top + picture.height >= height
    if inside:
        return picture.crop((-left, -top, width - left, height - top))
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(picture, (left, top))
    return canvas
