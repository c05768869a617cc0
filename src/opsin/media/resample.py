"""Pillow's antialiased resampling, integer for integer: for whoever resizes elsewhere and must make the same bytes.

Pillow resamples 8-bit pictures along one axis after the other, with weights of 22 fractional bits
(``src/libImaging/Resample.c``). Whoever multiplies bytes by these weights, adds a half, shifts and clips, and takes the
axes in the same order, gets the very bytes that Pillow makes. The weights are computed as its C code does it: in double
precision, and in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL

from opsin.types import Resize

PRECISION_BITS = 22

_PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])

_Doubles = npt.NDArray[np.float64]

_SINE_ERROR = 1e-6  # far above what another sine's last bits change in a weight, which is 2**22 at most


class Pass(NamedTuple):
    """One pass of a resize: ``axis`` is 0 down the picture and 1 across it."""

    axis: int
    resample: str
    num_in: int
    num_out: int


def passes(op: Resize, width: int, height: int) -> list[Pass]:
    """How Pillow resizes ``width`` x ``height`` pixels: in at most two passes, the one across first as a rule.

    Since Pillow 13, the one down is first where more than twice as many rows as columns are lost; since 12.2, where a
    picture a hundred times as tall as wide loses rows.
    """
    across, down = Pass(1, op.resample, width, op.width), Pass(0, op.resample, height, op.height)
    lost_rows, lost_columns = height - op.height, width - op.width
    if _PILLOW >= (13, 0):
        is_down_first = lost_rows > max(0, 2 * lost_columns)
    else:
        is_down_first = _PILLOW >= (12, 2) and lost_rows > 0 and height > 100 * width
    order = (down, across) if is_down_first else (across, down)
    return [part for part in order if part.num_in != part.num_out]


def make_taps(resample: str, num_in: int, num_out: int) -> npt.NDArray[np.int32]:
    """What each of ``num_out`` pixels takes of ``num_in`` along one axis.

    Args:
        resample: 'bilinear', 'bicubic' or 'lanczos'.

    Returns:
        (1 + K, num_out): the first of the K neighbours that a pixel takes from, all of them inside the picture, then
        their weights. Weights of neighbours that Pillow does not look at are 0.
    """
    support, weigh = _FILTERS[resample]
    scale = num_in / num_out
    filter_scale = max(scale, 1.0)
    reach = support * filter_scale
    center = (np.arange(num_out) + 0.5) * scale
    begin = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((center + reach + 0.5).astype(np.int64), num_in)
    num_taps = int((end - begin).max())
    first = np.minimum(begin, num_in - num_taps)
    at = first + np.arange(num_taps)[:, None]
    inside = (at >= begin) & (at < end)
    distance = (at - center + 0.5) * (1.0 / filter_scale)
    scaled = _scaled(np.where(inside, weigh(distance), 0.0))
    if resample == "lanczos" and (np.abs(np.abs(scaled) % 1.0 - 0.5) < _SINE_ERROR).any():
        scaled = _scaled(np.where(inside, _lanczos(distance, _c_sine), 0.0))
    taps = np.empty((1 + num_taps, num_out), np.int32)
    taps[0] = first
    taps[1:] = scaled + np.where(scaled < 0, -0.5, 0.5)  # cut towards zero, as a cast in C
    return taps


def _scaled(weights: _Doubles) -> _Doubles:
    total = np.cumsum(weights, axis=0)[-1]  # one after the other; NumPy's own sum may take them in another order
    return np.divide(weights, total, out=weights, where=total != 0.0) * (1 << PRECISION_BITS)


def resized(pixels: npt.NDArray[np.uint8], op: Resize) -> npt.NDArray[np.uint8]:
    """What Pillow makes of (height, width, 3) pixels, in NumPy: slow, and what the numbers above mean."""
    for step in passes(op, pixels.shape[1], pixels.shape[0]):
        first, *weights = make_taps(*step[1:])
        shape = (-1, 1) if step.axis else (-1, 1, 1)
        total = np.zeros(1, np.int32) + (1 << (PRECISION_BITS - 1))
        for tap, weight in enumerate(weights):
            total = total + np.take(pixels, first + tap, step.axis) * weight.reshape(shape)
        pixels = np.clip(total >> PRECISION_BITS, 0, 255).astype(np.uint8)
    return pixels


class _Filter(NamedTuple):
    support: float
    weigh: Callable[[_Doubles], _Doubles]


def _bilinear(x: _Doubles) -> _Doubles:
    x = np.abs(x)
    return np.where(x < 1.0, 1.0 - x, 0.0)


def _bicubic(x: _Doubles) -> _Doubles:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: _Doubles, sine: Callable[[_Doubles], _Doubles] = np.sin) -> _Doubles:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x, sine) * _sinc(x / 3, sine), 0.0)


def _sinc(x: _Doubles, sine: Callable[[_Doubles], _Doubles]) -> _Doubles:
    x = x * math.pi
    return np.divide(sine(x), x, out=np.ones_like(x), where=x != 0.0)


def _c_sine(x: _Doubles) -> _Doubles:
    """The C library's, which Pillow calls; NumPy's is many times faster, and may differ in the last bits."""
    return np.array([math.sin(value) for value in x.flat], np.float64).reshape(x.shape)


_FILTERS = {"bilinear": _Filter(1.0, _bilinear), "bicubic": _Filter(2.0, _bicubic), "lanczos": _Filter(3.0, _lanczos)}
