"""Self-attention over the paged cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.layers import Placement
from opsin.layers.linear import Linear, MergedLinear
from opsin.layers.norm import RMSNorm
from opsin.layers.rope import Rotary


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, arXiv:2305.13245.

    Args:
        window: positions a token sees, its own included; None is all before it.
        scale: what scores are multiplied by; head_dim**-0.5 by default.
        softcap: scores are bent into (-softcap, softcap).
        head_norm: makes the norms that each head of queries and keys goes through before it is rotated.
        neighbours: how many values of each head checkpoints rotate with the one beside them, rather than half a
            rotation away; they are the first.
    """

    def __init__(
        self,
        place: Placement,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        output_bias: bool,
        window: int | None,
        scale: float | None = None,
        softcap: float | None = None,
        head_norm: Callable[[], RMSNorm] | None = None,
        neighbours: int | None = None,
    ) -> None:
        super().__init__()
        self.kernels = place.kernels
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window = window
        self.softcap = softcap
        self.heads = (num_heads, num_kv_heads, num_kv_heads)  # of queries, keys and values
        pieces = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
        if neighbours is None:
            self.qkv_proj = MergedLinear(place, hidden_size, pieces, bias=qkv_bias)
        else:
            self.qkv_proj = NeighbourLinear(place, hidden_size, pieces, bias=qkv_bias, head=(head_dim, neighbours))
        self.o_proj = Linear(place, num_heads * head_dim, hidden_size, bias=output_bias, shard="in")
        self.q_norm, self.k_norm = (None, None) if head_norm is None else (head_norm(), head_norm())

    def forward(
        self,
        norm: RMSNorm,
        x_TD: torch.Tensor,
        residual_TD: torch.Tensor | None,
        rotary: Rotary,
        attention: AttentionInputs,
        cache: LayerCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what norm(x + residual) attends to, x + residual)."""
        qkv_TO, sum_TD = self.qkv_proj.normed(norm, x_TD, residual_TD)
        q_TNH, k_TKH, v_TKH = qkv_TO.view(qkv_TO.shape[0], -1, self.head_dim).split(self.heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = _each_head(self.q_norm, q_TNH), _each_head(self.k_norm, k_TKH)
        q_TNH, k_TKH = self.kernels.rope_and_write(q_TNH, k_TKH, v_TKH, *rotary, cache, attention.slot_mapping_T)
        out_TNH = self.kernels.paged_attention(
            q_TNH, k_TKH, v_TKH, cache, attention, self.scale, self.window, self.softcap
        )
        return self.o_proj(out_TNH.flatten(1)), sum_TD


class NeighbourLinear(MergedLinear):
    """Queries, keys and values of checkpoints that rotate each even value of a head with the odd one behind it, as
    GPT-J does, where kernels rotate the first half with the second. When the weights are packed, each head's even rows
    are put before its odd ones; queries and keys alike, so their products stay what they were.

    Args:
        head: (values of a head, how many of them are rotated).
    """

    def __init__(
        self, place: Placement, in_features: int, pieces: Mapping[str, int], *, bias: bool, head: tuple[int, int]
    ) -> None:
        super().__init__(place, in_features, pieces, bias=bias)
        self.head = head

    def pack(self) -> None:
        order_O = self._order().to(self.weight.device)
        for name, parameter in tuple(self.named_parameters(recurse=False)):  # scales of rows go with them
            bits = parameter.data.view(torch.uint8) if parameter.element_size() == 1 else parameter.data
            ordered = bits.index_select(0, order_O).view(parameter.dtype)
            setattr(self, name, nn.Parameter(ordered, requires_grad=False))
        super().pack()

    def _order(self) -> torch.Tensor:
        """int64 (O,): the rows of checkpoints as kernels want them."""
        head_dim, rotated = self.head
        rows_NH = torch.arange(sum(self.pieces.values())).view(-1, head_dim)
        halved_NH = torch.cat([rows_NH[:, 0:rotated:2], rows_NH[:, 1:rotated:2], rows_NH[:, rotated:]], dim=1)
        *_, values = self.pieces.values()
        return torch.cat([halved_NH.flatten()[:-values], rows_NH.flatten()[-values:]])


def _each_head(norm: RMSNorm, x_TNH: torch.Tensor) -> torch.Tensor:
    return norm(x_TNH.reshape(-1, x_TNH.shape[-1]))[0].view(x_TNH.shape)
