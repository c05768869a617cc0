"""Pictures and videos at sizes of their own, in whole units, their pixels within bounds: "smart resize". No torch.

Source: Hugging Face ``smart_resize`` of ``Qwen2VLImageProcessor``, of ``Qwen3VLVideoProcessor`` and of GLM-4.1V's
processors; arXiv:2409.12191.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from opsin.errors import MediaError
from opsin.models.picture_settings import request_settings

_MAX_ASPECT_RATIO = 200


def own_size(patch_size: int, least: int, most: int) -> dict[str, Any]:
    """The defaults of a processor that resizes so: from ``least`` to ``most`` pixels."""
    return {
        "size": {"shortest_edge": least, "longest_edge": most},
        "min_pixels": None,
        "max_pixels": None,
        "patch_size": patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }


def pixel_bounds(settings: Mapping[str, Any]) -> dict[str, int]:
    """{"shortest_edge", "longest_edge"}: despite their names, areas. ``ValueError`` where they are not."""
    size = dict(settings["size"]) if isinstance(settings["size"], Mapping) else {}
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if settings.get(name) is not None:
            size[edge] = settings[name]
            size.pop(name, None)
    if set(size) != {"shortest_edge", "longest_edge"} or not all(type(v) is int and v >= 1 for v in size.values()):
        raise ValueError(
            f"size is {settings['size']!r}, min_pixels {settings.get('min_pixels')!r} and max_pixels "
            f"{settings.get('max_pixels')!r}; the least and the most pixels must be whole numbers of at least 1, as "
            "size = {'shortest_edge': least, 'longest_edge': most} or by their names."
        )
    return size


def requested_bounds(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(least, most) pixels, of settings that a request changed.

    Raises:
        RequestError: they are none.
    """
    with request_settings():
        bounds = pixel_bounds(settings)
    return bounds["shortest_edge"], bounds["longest_edge"]


def smart_resize(
    width: int, height: int, unit: int, min_pixels: int, max_pixels: int, *, num_frames: int = 1, step: int = 1
) -> tuple[int, int]:
    """(width, height) in multiples of ``unit``, the pixels of all frames within bounds where they can be, rounded as
    Hugging Face does.

    Args:
        step: frames go in steps of so many.

    Raises:
        MediaError: one side is more than 200 times the other.
    """
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise MediaError(
            f"A picture of {width} x {height} pixels is too narrow: this model takes sides that differ by at most "
            f"{_MAX_ASPECT_RATIO} times. Crop it, or pad it to a squarer shape.",
            code="image_too_small",
        )
    pixels = round(num_frames / step) * step * round(width / unit) * round(height / unit) * unit**2
    if pixels > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        shrunk = [max(unit, math.floor(side / shrink / unit) * unit) for side in (width, height)]
        return shrunk[0], shrunk[1]
    if pixels < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        return math.ceil(width * grow / unit) * unit, math.ceil(height * grow / unit) * unit
    return round(width / unit) * unit, round(height / unit) * unit


def resize_video(
    width: int, height: int, num_frames: int, step: int, unit: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """As ``smart_resize``, once the shorter side is at least one unit."""
    if min(width, height) < unit:
        scale = max(unit / height, unit / width)
        width, height = int(width * scale), int(height * scale)
    return smart_resize(width, height, unit, min_pixels, max_pixels, num_frames=num_frames, step=step)
