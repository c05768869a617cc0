"""The reference with linear layers on oneDNN's blocked weights, attention by its products, and shorter ropes, for CPUs.

``F.linear`` re-reads a row-major weight in an order that wastes the cache. Packed once at load, a 9728 x 896 float32
layer takes 1.4 instead of 2.5 ms for one token, 2.2 instead of 6.5 ms for 16, and 21 instead of 56 ms for 256 (one
Zen 4 core, torch 2.13); bfloat16 gains 2.5x for one token and nothing for 256.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from opsin.kernels import reference
from opsin.kernels.inputs import LayerCache
from opsin.kernels.onednn import padded, product
from opsin.kernels.packed_attention import paged_attention, varlen_attention

_INT8_ROWS = 4  # the kernel for integers goes through the weight once for every four rows
_WIDENED = 2048  # rows of a weight that are widened at a time


def pack_linear(weight_OI: torch.Tensor) -> torch.Tensor:
    """float32 and bfloat16 are packed into a new tensor; oneDNN has no float16 path on most CPUs."""
    if weight_OI.dtype not in (torch.float32, torch.bfloat16):
        return weight_OI
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    if not weight_OI.is_mkldnn:
        return reference.linear(x_TI, weight_OI, bias_O)
    return product(x_TI, weight_OI, bias_O)


def int8_linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """Few rows wait for the weight to be read, which is half as long as in bfloat16; many for the products, which are
    fastest in x's dtype."""
    rows_TI = x_TI.flatten(0, -2)
    if len(rows_TI) <= _INT8_ROWS:
        y_TO = torch.ops.aten._weight_int8pack_mm(rows_TI.contiguous(), weight_OI, scale_O.to(x_TI.dtype))
    else:
        pieces = zip(weight_OI.split(_WIDENED), scale_O.to(x_TI.dtype).split(_WIDENED), strict=True)
        tall_TI = padded(rows_TI)
        y_TO = torch.cat([F.linear(tall_TI, part.to(x_TI.dtype)) * scale for part, scale in pieces], dim=1)
        y_TO = y_TO[: len(rows_TI)]
    y_TO = y_TO if bias_O is None else y_TO.add_(bias_O)
    return y_TO.view(*x_TI.shape[:-1], -1)


def apply_rope(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * cos + (x with its halves swapped) * (-sin, sin): four passes over heads, not nine over halves."""
    size = cos_TR.shape[-1]
    if 2 * size != q_TNH.shape[-1]:
        return reference.apply_rope(q_TNH, k_TKH, cos_TR, sin_TR)
    cos_T1H = torch.cat((cos_TR, cos_TR), dim=1).unsqueeze(1)
    sin_T1H = torch.cat((sin_TR.neg(), sin_TR), dim=1).unsqueeze(1)
    # cos and sin are float32, so the products are too, and rounding happens once.
    x_TMH = torch.cat((q_TNH, k_TKH), dim=1)
    turned_TMH = (x_TMH * cos_T1H).addcmul_(x_TMH.roll(size, -1), sin_T1H).to(x_TMH.dtype)
    q_TNH, k_TKH = turned_TMH.split((q_TNH.shape[1], k_TKH.shape[1]), dim=1)
    return q_TNH, k_TKH


def rope_and_write(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    cache: LayerCache,
    slot_mapping_T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_TNH, k_TKH = apply_rope(q_TNH, k_TKH, cos_TR, sin_TR)
    reference.write_kv(k_TKH, v_TKH, cache, slot_mapping_T)
    return q_TNH, k_TKH


KERNELS = dataclasses.replace(
    reference.KERNELS,
    pack_linear=pack_linear,
    linear=linear,
    normed_linear=reference.one_by_one(reference.rms_norm, linear, reference.gated_activation),
    int8_linear=int8_linear,
    apply_rope=apply_rope,
    rope_and_write=rope_and_write,
    paged_attention=paged_attention,
    varlen_attention=varlen_attention,
)
