"""MiniCPM-V's resampler: however many patches a slice has, a fixed number of learned queries looks at them once."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.layers.norm import LayerNorm
from opsin.layers.staging import upload
from opsin.models.towers.siglip_navit import PackedPatches

_NORM_EPS = 1e-6
HEAD_DIM = 128


class Resampler(nn.Module):
    """Patches of the tower, with their places added to what is looked for, to ``num_queries`` features a slice.

    ``query`` and ``proj`` are bare parameters in checkpoints: (queries, D) and (D, D), the latter applied as x @ proj.
    """

    def __init__(self, place: Placement, num_queries: int, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.query = place.parameter(num_queries, hidden_size)
        self.kv_proj = Linear(place, in_features, hidden_size, bias=False)
        self.attn = CrossAttention(place, hidden_size)
        self.ln_q = LayerNorm(place, hidden_size, _NORM_EPS)
        self.ln_kv = LayerNorm(place, hidden_size, _NORM_EPS)
        self.ln_post = LayerNorm(place, hidden_size, _NORM_EPS)
        self.proj = place.parameter(hidden_size, hidden_size)
        self.frequencies = torch.from_numpy(_frequencies(hidden_size // 4)).to(place.device)

    def forward(self, packed: PackedPatches) -> torch.Tensor:
        """(slices * num_queries, D)."""
        x_PD = self.ln_kv(self.kv_proj(packed.x_PD))
        lens = [rows * cols for rows, cols in packed.grids]
        out_MD = self.attn(self.ln_q(self.query), x_PD + self._places(packed).to(x_PD.dtype), x_PD, lens)
        return self.ln_post(out_MD) @ self.proj

    def _places(self, packed: PackedPatches) -> torch.Tensor:
        """Sine and cosine of each patch's column, then of its row: (P, D) in float32."""
        places_P2 = np.concatenate([np.indices(grid).reshape(2, -1)[::-1].T for grid in packed.grids])
        # One table for both axes, since the angles of a pack's patches repeat themselves many times over.
        angles_SF = torch.arange(int(places_P2.max()) + 1, device=packed.x_PD.device).unsqueeze(1) * self.frequencies
        table_SE = torch.cat([angles_SF.sin(), angles_SF.cos()], dim=1)
        (at_P2,) = upload([places_P2], table_SE.device)
        return F.embedding(at_P2, table_SE).flatten(1)


class CrossAttention(nn.Module):
    """torch's ``MultiheadAttention`` by name of its weights: those of queries, keys and values are one."""

    def __init__(self, place: Placement, hidden_size: int) -> None:
        super().__init__()
        self.in_proj_weight = place.parameter(3 * hidden_size, hidden_size)
        self.in_proj_bias = place.parameter(3 * hidden_size)
        self.out_proj = Linear(place, hidden_size, hidden_size, bias=True)

    def forward(self, q_QD: torch.Tensor, k_PD: torch.Tensor, v_PD: torch.Tensor, lens: list[int]) -> torch.Tensor:
        """The same queries for each run of ``lens`` keys: (runs * Q, D)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q_NQH, k_NPH, v_NPH = (
            F.linear(x, weight, bias).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)
            for x, weight, bias in zip((q_QD, k_PD, v_PD), weights, biases, strict=True)
        )
        parts: list[torch.Tensor] = []
        begin = 0
        for length, run in itertools.groupby(lens):  # an overview has one length, its slices another
            count = len(list(run))
            end = begin + count * length
            k, v = (x[:, begin:end].unflatten(1, (count, length)).transpose(0, 1) for x in (k_NPH, v_NPH))
            out_BNQH = F.scaled_dot_product_attention(q_NQH.expand(count, -1, -1, -1), k, v)
            parts.append(out_BNQH.transpose(1, 2).flatten(2).flatten(0, 1))
            begin = end
        return self.out_proj(torch.cat(parts))


def _frequencies(count: int) -> np.ndarray:
    """1 down to nearly 1 / 10,000, float32, rounded as the reference rounds."""
    return (1.0 / 10000 ** (np.arange(count, dtype=np.float32) / np.float32(count))).astype(np.float32)
