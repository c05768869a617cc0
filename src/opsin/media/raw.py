"""Pictures that are only decoded here, since the device resizes them: which ones, and what is asked of the workers."""

from __future__ import annotations

from opsin.types import Pad, PixelPlan, Resize, View

MAX_RAW_PIXELS = 8_000_000
"""Beyond this a resize costs less than moving the pixels: three bytes each, in shared and in pinned memory."""

_MAX_SIDE = 2**14  # a table of weights has some six rows' worth of numbers per pixel of the longer side


def raw_plan(plan: PixelPlan, max_pixels: int) -> PixelPlan | None:
    """The plan of one picture as it is, upright, where the device is to do what ``plan`` says of its views.

    None where the workers do all: for videos; for plans that resize nothing, or by Pillow's 'nearest', which is another
    algorithm; and where the picture, or anything on the way to its tiles, would have more than ``max_pixels``, or none:
    a worker's error is the request's, a step's would be everybody's.

    Args:
        max_pixels: 0 where the device does not resize.
    """
    if len(set(plan.frames)) != 1 or not _is_small(plan.width, plan.height, max_pixels):
        return None
    resizes = False
    for view in plan.views:
        width, height = plan.width, plan.height
        for op in view.ops:
            if isinstance(op, Pad):
                width, height = width + op.left + op.right, height + op.top + op.bottom
            else:
                if isinstance(op, Resize):
                    if op.resample == "nearest" or not _is_small(op.width, height, max_pixels):
                        return None
                    resizes |= (op.width, op.height) != (width, height)
                width, height = op.width, op.height
            if not _is_small(width, height, max_pixels):
                return None
    if not resizes:
        return None
    return PixelPlan(plan.width, plan.height, (_as_it_is(plan),), plan.frames[:1])


def is_raw(plan: PixelPlan) -> bool:
    """The plan is what ``raw_plan`` makes: its one tile is the picture."""
    return plan.views == (_as_it_is(plan),) and len(plan.frames) == 1


def _as_it_is(plan: PixelPlan) -> View:
    return View((), height=plan.height, width=plan.width)


def _is_small(width: int, height: int, max_pixels: int) -> bool:
    return 0 < width * height <= max_pixels and max(width, height) <= _MAX_SIDE
