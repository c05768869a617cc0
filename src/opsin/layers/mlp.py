"""Feed-forward blocks."""

from __future__ import annotations

import torch
from torch import nn

from opsin.layers import Placement
from opsin.layers.linear import Linear, MergedLinear, spare
from opsin.layers.norm import LayerNorm, RMSNorm


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), arXiv:2002.05202."""

    def __init__(self, place: Placement, hidden_size: int, intermediate_size: int, act: str, *, bias: bool) -> None:
        super().__init__()
        self.act = act
        pieces = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        num_spare = spare(intermediate_size)
        self.gate_up_proj = MergedLinear(place, hidden_size, pieces, bias=bias, num_spare=num_spare)
        self.down_proj = Linear(
            place, intermediate_size, hidden_size, bias=bias, shard="in", num_spare_inputs=num_spare
        )

    def normed(
        self, norm: LayerNorm | RMSNorm, x_TD: torch.Tensor, residual_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(self(norm(x + residual)), x + residual)."""
        if self.down_proj.is_fp8:
            gate_up_T2F, sum_TD = self.gate_up_proj.normed(norm, x_TD, residual_TD)
            return self.down_proj.gated(gate_up_T2F, self.act), sum_TD
        gated_TF, sum_TD = self.gate_up_proj.normed(norm, x_TD, residual_TD, gate=self.act)
        return self.down_proj(gated_TF), sum_TD


class MLP(nn.Module):
    """fc2(act(fc1(x))), as vision towers have it."""

    def __init__(self, place: Placement, hidden_size: int, intermediate_size: int, act: str) -> None:
        super().__init__()
        self.act = act
        self.fc1 = Linear(place, hidden_size, intermediate_size, bias=True, shard="out")
        self.fc2 = Linear(place, intermediate_size, hidden_size, bias=True, shard="in")

    def normed(
        self, norm: LayerNorm | RMSNorm, x_TD: torch.Tensor, residual_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(self(norm(x + residual)), x + residual)."""
        x_TF, sum_TD = self.fc1.normed(norm, x_TD, residual_TD)
        return self.fc2.activated(x_TF, self.act), sum_TD
