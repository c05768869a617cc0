"""Which pictures are only decoded, for the device to resize."""

from __future__ import annotations

import numpy as np
import pytest

from opsin.media.ops import make_frames
from opsin.media.raw import MAX_RAW_PIXELS, raw_plan
from opsin.types import Crop, Pad, PixelOp, PixelPlan, Resize, View

from .pictures import photo

LIMIT = 10_000


def plan(width: int, height: int, *ops: PixelOp, frames: tuple[int, ...] = (0,)) -> PixelPlan:
    """Of two views, of which the second does nothing."""
    return PixelPlan(width, height, (View(ops, height=8, width=8), View((), height=height, width=width)), frames)


def test_raw_plan_asks_for_the_picture_as_it_is() -> None:
    raw = raw_plan(plan(20, 10, Resize(8, 8)), LIMIT)
    assert raw is not None
    assert raw == PixelPlan(20, 10, (View((), height=10, width=20),))
    picture, out = photo(20, 10), np.empty(raw.num_bytes, np.uint8)
    make_frames([picture], raw, out)
    np.testing.assert_array_equal(out.reshape(10, 20, 3), np.asarray(picture))


def test_raw_plan_of_a_frame_that_stands_several_times_asks_for_it_once() -> None:
    raw = raw_plan(plan(20, 10, Resize(8, 8), frames=(5, 5)), LIMIT)
    assert raw is not None
    assert raw.frames == (5,)


@pytest.mark.parametrize(
    "left",
    [
        plan(20, 10),
        plan(20, 10, Resize(20, 10)),
        plan(20, 10, Crop(0, 0, 8, 8), Pad(1, 1, 1, 1)),
        plan(20, 10, Resize(8, 8, "nearest")),
        plan(20, 10, Resize(30, 30), Resize(8, 8, "nearest")),
        plan(20, 10, Resize(8, 8), frames=(0, 1)),
        plan(101, 100, Resize(8, 8)),
        plan(20, 10, Resize(101, 100), Resize(8, 8)),
        plan(20, 10, Pad(90, 0, 0, 91), Resize(8, 8)),
        plan(2, 5000, Resize(3, 8)),
        plan(20, 10, Resize(8, 0)),
    ],
    ids=[
        "no ops",
        "resize to its own size",
        "no resize",
        "nearest",
        "nearest behind another",
        "frames of a video",
        "too large",
        "enlarged too much",
        "padded too much",
        "enlarged too much on the way",
        "resized to nothing",
    ],
)
def test_plan_is_left_to_the_workers(left: PixelPlan) -> None:
    assert raw_plan(left, LIMIT) is None


def test_no_plan_is_raw_where_the_device_does_not_resize() -> None:
    assert raw_plan(plan(20, 10, Resize(8, 8)), 0) is None


def test_very_long_side_is_left_to_the_workers() -> None:
    assert raw_plan(plan(2**14, 3, Resize(8, 8)), MAX_RAW_PIXELS) is not None
    assert raw_plan(plan(2**14 + 1, 3, Resize(8, 8)), MAX_RAW_PIXELS) is None
