"""Several pictures' patches as one sequence: which comes where, from sizes alone. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """How the patches of several pictures lie in one sequence, on the host. Two frames of a video are one picture.

    Attributes:
        positions_P2: row and column of each patch in its own picture.
        sizes_P2: rows and columns of that picture.
        order_M: the features in the order of the sequence, as indices into the pictures' own order; None is the same.
        full_lens: patches per picture.
        window_lens: patches per window.
    """

    positions_P2: np.ndarray
    sizes_P2: np.ndarray
    order_M: np.ndarray | None
    full_lens: tuple[int, ...]
    window_lens: tuple[int, ...]


def pack(grids: Sequence[tuple[int, int]], merge_size: int, window: int | None) -> Packing:
    """Lay out pictures of ``grids`` (rows, columns) patches; with windows, window after window."""
    positions: list[np.ndarray] = []
    orders: list[np.ndarray] = []
    window_lens: list[int] = []
    start = 0
    area = merge_size**2
    for rows, cols in grids:
        high, wide = rows // merge_size, cols // merge_size
        blocks = np.indices((rows, cols)).reshape(2, high, merge_size, wide, merge_size)
        positions_MA2 = blocks.transpose(1, 3, 2, 4, 0).reshape(high * wide, area, 2)
        if window is not None:
            units = np.arange(high * wide).reshape(high, wide)
            windows = [
                units[y : y + window, x : x + window].ravel()
                for y in range(0, high, window)
                for x in range(0, wide, window)
            ]
            order = np.concatenate(windows)
            positions_MA2 = positions_MA2[order]
            orders.append(order + start)
            window_lens += [len(inside) * area for inside in windows]
        positions.append(positions_MA2.reshape(-1, 2))
        start += high * wide
    return Packing(
        positions_P2=np.concatenate(positions),
        sizes_P2=np.repeat(np.array(grids), [rows * cols for rows, cols in grids], axis=0),
        order_M=np.concatenate(orders) if orders else None,
        full_lens=tuple(rows * cols for rows, cols in grids),
        window_lens=tuple(window_lens),
    )
