"""Linear layers. Each says which of its axes tensor parallelism would shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from opsin.layers import Placement

ShardAxis = Literal["out", "in"]


class Linear(nn.Module):
    """y = x @ weight.T + bias.

    Attributes:
        shard: the axis to split over ranks: 'out' features (outputs stay apart), 'in' features (outputs are summed),
            or None for a copy on each.
        checkpoint_shape: the weight's shape in checkpoints where it is not (out, in), as for a convolution.
    """

    def __init__(
        self,
        place: Placement,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        shard: ShardAxis | None = None,
        checkpoint_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.kernels = place.kernels
        self.shard = shard
        self.checkpoint_shape = checkpoint_shape
        self.weight = place.parameter(out_features, in_features)
        self.bias = place.parameter(out_features) if bias else None

    def pack(self) -> None:
        """Bring the loaded weight into the kernels' own form; call once, after loading."""
        packed = self.kernels.pack_linear(self.weight)
        if packed is not self.weight:  # a tied head keeps the very parameter, which is counted once
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self.kernels.linear(x_TI, self.weight, self.bias)


class MergedLinear(Linear):
    """Several linear layers of one input as a single matrix product.

    Args:
        pieces: checkpoint name to output size, in order: ``{"q_proj": 512, "k_proj": 128, "v_proj": 128}``. A
            checkpoint may hold the pieces, or the merged weight under this layer's own name.
    """

    def __init__(self, place: Placement, in_features: int, pieces: Mapping[str, int], *, bias: bool) -> None:
        super().__init__(place, in_features, sum(pieces.values()), bias=bias, shard="out")
        self.pieces = dict(pieces)

    def split(self, y_TO: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pieces' outputs, as views."""
        return y_TO.split(tuple(self.pieces.values()), dim=-1)
