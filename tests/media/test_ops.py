"""Pixel plans: tiles in the order that types.py promises, borders and windows where they belong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.errors import MediaError
from opsin.media.ops import MAX_INTERMEDIATE_PIXELS, make_tiles, output_size
from opsin.types import Crop, Pad, PixelOp, PixelPlan, Resize, View

from .pictures import photo


def tiles(image: Image.Image, *views: View) -> list[np.ndarray]:
    plan = PixelPlan(width=image.width, height=image.height, views=views)
    out = np.empty(plan.num_bytes, np.uint8)
    make_tiles(image, plan, out)
    cut: list[np.ndarray] = []
    start = 0
    for height, width in plan.tile_sizes:
        cut.append(out[start : start + height * width * 3].reshape(height, width, 3))
        start += height * width * 3
    assert start == out.size
    return cut


def whole(image: Image.Image, ops: Sequence[PixelOp]) -> np.ndarray:
    width, height = output_size(ops, *image.size)
    [tile] = tiles(image, View(ops=tuple(ops), height=height, width=width))
    return tile


def test_tiles_come_by_view_then_row_then_column() -> None:
    image = photo(60, 40)
    overview = View(ops=(Resize(7, 5, "bilinear"),), height=5, width=7)
    grid = View(ops=(Resize(30, 24),), height=12, width=10, rows=2, cols=3)
    cut = tiles(image, overview, grid)
    assert len(cut) == 7
    np.testing.assert_array_equal(cut[0], np.asarray(image.resize((7, 5), Image.Resampling.BILINEAR)))
    resized = np.asarray(image.resize((30, 24), Image.Resampling.BICUBIC))
    for index, tile in enumerate(cut[1:]):
        row, col = divmod(index, 3)
        expected = resized[12 * row : 12 * row + 12, 10 * col : 10 * col + 10]
        np.testing.assert_array_equal(tile, expected, err_msg=f"tile {row}, {col}")


def test_ops_apply_in_order() -> None:
    image = photo(20, 10)
    padded_first = whole(image, [Pad(0, 5, 0, 5, (9, 8, 7)), Resize(10, 10)])
    resized_first = whole(image, [Resize(10, 5), Pad(0, 2, 0, 3, (9, 8, 7))])
    assert padded_first.shape == resized_first.shape
    assert (padded_first[0] == (9, 8, 7)).all()
    assert (resized_first[-1] == (9, 8, 7)).all()
    assert not np.array_equal(padded_first, resized_first)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    left=st.integers(-15, 15),
    top=st.integers(-15, 15),
    width=st.integers(1, 30),
    height=st.integers(1, 30),
)
def test_crop_takes_its_window_and_fills_what_lies_outside(left: int, top: int, width: int, height: int) -> None:
    image = photo(12, 9)
    margin = 60
    canvas = np.full((9 + 2 * margin, 12 + 2 * margin, 3), (1, 2, 3), np.uint8)
    canvas[margin : margin + 9, margin : margin + 12] = np.asarray(image)
    expected = canvas[margin + top :, margin + left :][:height, :width]
    np.testing.assert_array_equal(whole(image, [Crop(left, top, width, height, (1, 2, 3))]), expected)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(sides=st.tuples(*[st.integers(0, 5)] * 4))
def test_pad_surrounds_the_picture(sides: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = sides
    image = photo(6, 4)
    expected = np.full((4 + top + bottom, 6 + left + right, 3), (4, 5, 6), np.uint8)
    expected[top : top + 4, left : left + 6] = np.asarray(image)
    np.testing.assert_array_equal(whole(image, [Pad(left, top, right, bottom, (4, 5, 6))]), expected)


@pytest.mark.parametrize(
    "ops",
    [[Resize(0, 5)], [Resize(MAX_INTERMEDIATE_PIXELS, 2)], [Resize(10, 10), Pad(2**14, 2**14, 0, 0)]],
    ids=["nothing-left", "resize-explodes", "pad-explodes"],
)
def test_output_size_refuses_nothing_and_explosions(ops: list[PixelOp]) -> None:
    with pytest.raises(MediaError) as caught:
        output_size(ops, 10, 10)
    assert caught.value.code == "image_too_small"


def test_output_size_lets_a_huge_picture_shrink() -> None:
    assert output_size([Crop(0, 0, 12_000, 12_000), Resize(5, 6)], 13_000, 13_000) == (5, 6)


def test_make_tiles_of_another_size_than_planned_fails() -> None:
    plan = PixelPlan(width=5, height=5, views=())
    with pytest.raises(MediaError) as caught:
        make_tiles(photo(5, 6), plan, np.empty(0, np.uint8))
    assert caught.value.code == "image_parse_error"
