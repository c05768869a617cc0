"""From a tower's width to the decoder's, as most families do it."""

from __future__ import annotations

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
