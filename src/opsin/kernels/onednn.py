"""oneDNN's matrix products, of few heights.

For every shape that it meets oneDNN compiles a program of half a MiB, which takes 0.4 ms and more, and it keeps the
last 1,024 of them. Steps come in all heights; so they are rounded up to few, with rows of zeros that nobody reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bucket(size: int) -> int:
    """The next of the heights that are computed: four or eight to each doubling, so at most a quarter more."""
    if size <= 4:
        return size
    doublings = (size - 1).bit_length()
    unit = 1 << (doublings - (3 if size <= 128 else 4))
    return -(-size // unit) * unit


def padded(rows_TI: torch.Tensor) -> torch.Tensor:
    """Rows of zeros below, up to the next ``bucket``."""
    num_rows = rows_TI.shape[0]
    num_pads = bucket(num_rows) - num_rows
    return F.pad(rows_TI, (0, 0, 0, num_pads)) if num_pads else rows_TI


def product(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. The weight may be packed by ``torch.ops.mkldnn._reorder_linear_weight``."""
    rows_TI = x_TI if x_TI.dim() == 2 else x_TI.flatten(0, -2)
    y_TO = torch.ops.mkldnn._linear_pointwise(padded(rows_TI), weight_OI, bias_O, "none", [], "")
    if y_TO.shape[0] != rows_TI.shape[0]:
        y_TO = y_TO[: rows_TI.shape[0]]
    return y_TO if rows_TI is x_TI else y_TO.view(*x_TI.shape[:-1], y_TO.shape[1])
