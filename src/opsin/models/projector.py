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
        self.act = act
        self.linear_1 = Linear(place, in_features, hidden_size, bias=bias)
        self.linear_2 = Linear(place, hidden_size, hidden_size, bias=bias)

    def forward(self, x_MD: torch.Tensor, /) -> torch.Tensor:
        return self.linear_2.activated(self.linear_1(x_MD), self.act)


def pixel_shuffle(hidden_BPD: torch.Tensor, merge: int) -> torch.Tensor:
    """Lay each block of ``merge`` x ``merge`` patches of square tiles side by side, row by row: (tiles * features,
    merge**2 * D)."""
    edge = math.isqrt(hidden_BPD.shape[1]) // merge
    blocks = hidden_BPD.unflatten(1, (edge, merge, edge, merge))  # tile, row, row in block, column, ...
    return blocks.transpose(2, 3).flatten(3).flatten(0, 2)


class PatchMerger(nn.Module):
    """A block's patches side by side, to one patch's width."""

    def __init__(self, place: Placement, width: int, merge: int) -> None:
        super().__init__()
        self.merging_layer = MergingLinear(place, width, merge, width, bias=False)

    def forward(self, x_ME: torch.Tensor) -> torch.Tensor:
        return self.merging_layer(x_ME)


class MergingLinear(Linear):
    """Checkpoints hold the weight for blocks that are laid out value by value, a block's patches within each, as for a
    convolution; it is turned once, when the weights are packed, to take them patch by patch.

    Args:
        width: of a patch, of which ``merge`` x ``merge`` are a block.
        is_convolution: checkpoints spell it as one.
    """

    may_be_quantized = False

    def __init__(
        self, place: Placement, width: int, merge: int, out_features: int, *, bias: bool, is_convolution: bool = False
    ) -> None:
        shape = (out_features, width, merge, merge) if is_convolution else None
        super().__init__(place, width * merge**2, out_features, bias=bias, checkpoint_shape=shape)
        self.width = width

    def pack(self) -> None:
        turned = self.weight.view(len(self.weight), self.width, -1).transpose(1, 2).flatten(1)
        self.weight = nn.Parameter(turned.contiguous(), requires_grad=False)
        super().pack()
