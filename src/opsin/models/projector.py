"""From a tower's width to the decoder's, as most families do it."""

from __future__ import annotations

import math

import torch
from torch import nn

from opsin.layers import Placement
from opsin.layers.linear import Linear


class Projector(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, place: Placement, in_features: int, hidden_size: int, act: str, *, bias: bool) -> None:
        super().__init__()
        self.kernels = place.kernels
        self.act = act
        self.linear_1 = Linear(place, in_features, hidden_size, bias=bias)
        self.linear_2 = Linear(place, hidden_size, hidden_size, bias=bias)

    def forward(self, x_MD: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.kernels.activation(self.linear_1(x_MD), self.act))


def pixel_shuffle(hidden_BPD: torch.Tensor, merge: int) -> torch.Tensor:
    """Lay each block of ``merge`` x ``merge`` patches of square tiles side by side, row by row: (tiles * features,
    merge**2 * D)."""
    edge = math.isqrt(hidden_BPD.shape[1]) // merge
    blocks = hidden_BPD.unflatten(1, (edge, merge, edge, merge))  # tile, row, row in block, column, ...
    return blocks.transpose(2, 3).flatten(3).flatten(0, 2)
