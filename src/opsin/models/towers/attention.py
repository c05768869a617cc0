"""Attention among the patches of a picture, as every tower has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from opsin.layers import Placement
from opsin.layers.linear import Linear, MergedLinear
from opsin.layers.norm import LayerNorm, RMSNorm, normed
from opsin.layers.rope import Rotary


class Segments(NamedTuple):
    """Which patches see one another: those of a picture, of a tile or of a window, one after the other.

    Attributes:
        cu_seqlens_B1: int32, on the device, where each begins, and the end of all.
        seq_lens: patches in each; None where only the device knows.
    """

    cu_seqlens_B1: torch.Tensor
    seq_lens: tuple[int, ...] | None


class PatchAttention(nn.Module):
    """Multi-head attention without a mask; nothing is cached.

    Args:
        norm: makes the norms that queries and keys go through, all heads as one vector.
    """

    def __init__(
        self,
        place: Placement,
        hidden_size: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        output_bias: bool = True,
        norm: Callable[[], RMSNorm] | None = None,
    ) -> None:
        super().__init__()
        self.kernels = place.kernels
        self.head_dim = hidden_size // num_heads
        pieces = {"q_proj": hidden_size, "k_proj": hidden_size, "v_proj": hidden_size}
        self.qkv_proj = MergedLinear(place, hidden_size, pieces, bias=qkv_bias)
        self.q_norm, self.k_norm = (None, None) if norm is None else (norm(), norm())
        self.out_proj = Linear(place, hidden_size, hidden_size, bias=output_bias, shard="in")

    def forward(
        self,
        norm: LayerNorm | RMSNorm,
        x_PD: torch.Tensor,
        residual_PD: torch.Tensor | None,
        segments: Segments,
        rotary: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what norm(x + residual) attends to, x + residual)."""
        qkv_PO, sum_PD = self.qkv_proj.normed(norm, x_PD, residual_PD)
        q_PD, k_PD, v_PD = self.qkv_proj.split(qkv_PO)
        if self.q_norm is not None and self.k_norm is not None:
            q_PD, k_PD = normed(self.q_norm, q_PD.contiguous()), normed(self.k_norm, k_PD.contiguous())
        q_PNH, k_PNH, v_PNH = (y_PD.unflatten(-1, (-1, self.head_dim)) for y_PD in (q_PD, k_PD, v_PD))
        if rotary is not None:
            q_PNH, k_PNH = self.kernels.apply_rope(q_PNH, k_PNH, *rotary)
        out_PNH = self.kernels.varlen_attention(q_PNH, k_PNH, v_PNH, *segments, self.head_dim**-0.5)
        return self.out_proj(out_PNH.flatten(1)), sum_PD
