"""Several pictures' patches as one sequence: which comes where, from sizes alone. No torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """How the patches of several pictures lie in one sequence, on the host. Two frames of a video are one picture.

    Attributes:
        positions_P2: int32, row and column of each patch in its own picture.
        order_M: int32, the features in the order of the sequence, as indices into the pictures' own order; None is the
            same.
        places_M: int32, the other way round: where in the sequence each feature is; None with ``order_M``.
        full_lens: patches per picture.
        window_lens: patches per window.
    """

    positions_P2: np.ndarray
    order_M: np.ndarray | None
    places_M: np.ndarray | None
    full_lens: tuple[int, ...]
    window_lens: tuple[int, ...]


def pack(grids: Sequence[tuple[int, int]], merge_size: int, window: int | None) -> Packing:
    """Lay out pictures of ``grids`` (rows, columns) patches; with windows, window after window."""
    pictures = [_pack(rows, cols, merge_size, window) for rows, cols in grids]
    if len(pictures) == 1:
        return pictures[0]
    order_M = places_M = None
    if window is not None:
        starts = np.cumsum([0, *(rows * cols // merge_size**2 for rows, cols in grids)], dtype=np.int32)
        order_M, places_M = (
            np.concatenate([part + start for part, start in zip(parts, starts, strict=False)])
            for parts in ([picture.order_M for picture in pictures], [picture.places_M for picture in pictures])
        )
    return Packing(
        positions_P2=np.concatenate([picture.positions_P2 for picture in pictures]),
        order_M=order_M,
        places_M=places_M,
        full_lens=tuple(rows * cols for rows, cols in grids),
        window_lens=tuple(count for picture in pictures for count in picture.window_lens),
    )


@functools.lru_cache(maxsize=128)  # 350 KB each at most, and some 20 as a rule
def _pack(rows: int, cols: int, merge_size: int, window: int | None) -> Packing:
    """Of one picture."""
    high, wide = rows // merge_size, cols // merge_size
    blocks = np.indices((rows, cols), dtype=np.int32).reshape(2, high, merge_size, wide, merge_size)
    positions_MA2 = blocks.transpose(1, 3, 2, 4, 0).reshape(high * wide, merge_size**2, 2)
    order_M = places_M = None
    window_lens: list[int] = []
    if window is not None:
        units = np.arange(high * wide, dtype=np.int32).reshape(high, wide)
        windows = [
            units[y : y + window, x : x + window].ravel()
            for y in range(0, high, window)
            for x in range(0, wide, window)
        ]
        order_M = np.concatenate(windows)
        places_M = np.empty_like(order_M)
        places_M[order_M] = units.ravel()
        positions_MA2 = positions_MA2[order_M]
        window_lens = [len(inside) * merge_size**2 for inside in windows]
    return Packing(positions_MA2.reshape(-1, 2), order_M, places_M, (rows * cols,), tuple(window_lens))
