"""An overview of a picture, and slices of it on the grid nearest to its shape, all in whole patches and of about one
area: LLaVA-UHD, arXiv:2403.11703. No torch.

Source: the ``MiniCPMVImageProcessor`` of the checkpoint openbmb/MiniCPM-V-2_6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from opsin.errors import MediaError
from opsin.media.ops import output_size
from opsin.models.tiles import grids
from opsin.types import Resize, View

Size = tuple[int, int]
"""(width, height) in pixels, or (columns, rows) in slices."""

_MOST_STRETCH = 8  # a slice is some scale squared; of a line, one patch high, it could be any number of them


def slice_grid(size: Size, scale: int, max_slices: int) -> Size | None:
    """(columns, rows) of the slices; None where the overview is enough.

    As many as the picture has areas of ``scale`` squared, one less or one more; the grid whose shape is nearest.
    """
    count = min(num_areas(size, scale), max_slices)
    if count <= 1:
        return None
    return nearest_grid(size, [n for n in (count - 1, count, count + 1) if 1 < n <= max_slices])


def nearest_grid(size: Size, counts: Sequence[int]) -> Size:
    """Of the grids of ``counts`` slices, the one whose shape is nearest to the picture's; of equals, the first."""
    shape = math.log(size[0] / size[1])
    return min(grids(counts), key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))


def num_areas(size: Size, scale: int) -> int:
    """How many areas of ``scale`` squared the picture takes."""
    return math.ceil(size[0] * size[1] / (scale * scale))


def best_size(width: float, height: float, scale: int, patch_size: int, *, enlarge: bool) -> Size:
    """(width, height) in whole patches, the shape kept: an area of about ``scale`` squared, or the picture's own where
    that is smaller and ``enlarge`` is false."""
    if enlarge or width * height > scale * scale:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)
    return _whole(width, patch_size), _whole(height, patch_size)


def overview(size: Size, scale: int, patch_size: int, *, enlarge: bool) -> View:
    """The whole picture.

    Raises:
        MediaError: it is so narrow that it would be far larger than usual.
    """
    return _view(best_size(*size, scale, patch_size, enlarge=enlarge), (1, 1), scale)


def slices(size: Size, grid: Size, scale: int, patch_size: int) -> View:
    """Slices of it, (columns, rows) of them. The picture is first thought of as rounded to whole ones.

    Raises:
        MediaError: as for ``overview``.
    """
    width, height = (_whole(length, count) / count for length, count in zip(size, grid, strict=True))
    return _view(best_size(width, height, scale, patch_size, enlarge=True), grid, scale)


def _view(part: Size, grid: Size, scale: int) -> View:
    (width, height), (cols, rows) = part, grid
    if width * height > _MOST_STRETCH * scale**2:
        raise MediaError(
            f"The picture is too narrow: a slice of it would be {width} x {height} pixels. Crop it, or pad it to a "
            "squarer shape.",
            code="image_too_small",
        )
    ops = (Resize(cols * width, rows * height, "bicubic"),)
    output_size(ops, width, height)
    return View(ops, height=height, width=width, rows=rows, cols=cols)


def _whole(length: float, unit: int) -> int:
    """The nearest multiple of ``unit``, at least one."""
    return max(round(length / unit) * unit, unit)
