"""Pillow's integers, computed here: the bytes of every resize are Pillow's own."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.media import resample as module
from opsin.media.resample import make_taps, passes, resized
from opsin.types import Resize

Filter = Literal["bilinear", "bicubic", "lanczos"]
FILTERS: tuple[Filter, ...] = ("bilinear", "bicubic", "lanczos")
SIDES = st.one_of(st.sampled_from((1, 2, 3, 7, 28, 64, 99, 100, 224)), st.integers(1, 260))


def noise(width: int, height: int, *, only_extremes: bool = False) -> npt.NDArray[np.uint8]:
    """Bytes of any value, or of 0 and 255 alone, which the negative weights of a filter take out of range."""
    random = np.random.default_rng(width * 10_007 + height)
    values = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(values < 128, 0, 255).astype(np.uint8) if only_extremes else values


def pillows(pixels: npt.NDArray[np.uint8], op: Resize) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((op.width, op.height), Image.Resampling[op.resample.upper()]))


@settings(deadline=None, derandomize=True, max_examples=250)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(FILTERS), st.booleans())
def test_resized_pixels_are_pillows(
    width: int, height: int, new_width: int, new_height: int, name: Filter, only_extremes: bool
) -> None:
    pixels = noise(width, height, only_extremes=only_extremes)
    op = Resize(new_width, new_height, name)
    np.testing.assert_array_equal(resized(pixels, op), pillows(pixels, op))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(
    "sizes",
    [(1024, 768, 1036, 756), (3000, 40, 17, 900), (40, 3000, 900, 17), (1, 1000, 1000, 1), (1000, 1, 1, 1000)],
    ids=str,
)
def test_resized_pixels_are_pillows_at_real_and_at_extreme_sizes(
    sizes: tuple[int, int, int, int], name: Filter
) -> None:
    pixels, op = noise(*sizes[:2]), Resize(*sizes[2:], name)
    np.testing.assert_array_equal(resized(pixels, op), pillows(pixels, op))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 9), (9, 1), (30, 28), (5, 6), (400, 30)])
def test_taps_stay_inside_the_picture(name: Filter, num_in: int, num_out: int) -> None:
    taps = make_taps(name, num_in, num_out)
    assert taps.shape[1] == num_out
    assert taps[0].min() >= 0
    assert (taps[0] + len(taps) - 1).max() <= num_in


def test_lanczos_near_a_half_is_computed_with_the_c_librarys_sine(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(1024, 1036), (768, 756), (640, 364), (7, 3), (3, 7)]
    usual = [make_taps("lanczos", *size) for size in sizes]
    monkeypatch.setattr(module, "_SINE_ERROR", 1.0)  # all are near enough
    asked: list[int] = []
    monkeypatch.setattr(module, "_c_sine", lambda x, sine=module._c_sine: asked.append(1) or sine(x))
    for size, taps in zip(sizes, usual, strict=True):
        np.testing.assert_array_equal(make_taps("lanczos", *size), taps)
    assert len(asked) == 2 * len(sizes)


def test_axes_that_keep_their_size_are_left_alone() -> None:
    assert passes(Resize(30, 20), 30, 20) == []
    assert [part.axis for part in passes(Resize(31, 20), 30, 20)] == [1]
    assert [part.axis for part in passes(Resize(30, 21), 30, 20)] == [0]
