"""Attention on a CPU as oneDNN's matrix products.

torch's own attention runs both of its products at a fraction of what oneDNN's linear layers reach: 1024 tokens of one
64-wide head take 3.4 ms in bfloat16 and 3.2 in float32, here 1.5 and 1.7 (one Zen 5 core, torch 2.13). Scores and
softmax are float32 whatever the dtype. Few tokens leave too little work to gain from, so they stay with torch's, in as
few calls as can be, and all that says what they see is made once for the layers of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from opsin.kernels import reference
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.onednn import bucket, padded, product

_BLOCK_ROWS = 512  # queries, times heads that share keys, whose scores are in memory at once
_FEW_TOKENS = 192  # sequences that torch's own attention takes as fast
_ONE_CALL_VALUES = 2**19  # gathered values of keys up to which one call is faster; with more, rows evict one another


class _Part(NamedTuple):
    """Tokens [begin, end) of a step that are attended to in one call: one row's, or those of rows of one token each.

    Attributes:
        places: one row's blocks; of several rows slots, as many for each: those behind a row's last key hold it once
            more, since what lies behind it may be no number.
        span: which of the blocks' slots hold the row's keys; None where ``places`` are slots.
        mask: what is added to scores; None adds nothing. For many tokens a boolean (T, C), or None, each sees up to
            itself.
    """

    begin: int
    end: int
    num_rows: int
    places: torch.Tensor
    span: slice | None
    mask: torch.Tensor | None

    def take(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy of one side of a cache: (keys of all rows, K, H)."""
        if self.span is None:
            return reference.take(stored.flatten(0, 1), self.places, dtype)
        return reference.take(stored, self.places, dtype).flatten(0, 1)[self.span]


def paged_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cache: LayerCache,
    inputs: AttentionInputs,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    group = q_TNH.shape[1] // k_TKH.shape[1]
    kind = (window, group, k_TKH.shape[1:])
    parts: list[_Part] | None = inputs.kept.get(kind)
    if parts is None:
        parts = inputs.kept[kind] = list(_parts(inputs, cache, window, group))
    outs = [_attend(q_TNH[part.begin : part.end], cache, part, scale, softcap) for part in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def varlen_attention(
    q_PNH: torch.Tensor,
    k_PNH: torch.Tensor,
    v_PNH: torch.Tensor,
    cu_seqlens_B1: torch.Tensor,
    seq_lens: tuple[int, ...] | None,
    scale: float,
) -> torch.Tensor:
    if seq_lens is None or min(seq_lens, default=0) < _FEW_TOKENS:
        return reference.varlen_attention(q_PNH, k_PNH, v_PNH, cu_seqlens_B1, seq_lens, scale)
    sequences = zip(*(x_PNH.split(seq_lens) for x_PNH in (q_PNH, k_PNH, v_PNH)), strict=True)
    parts = [_by_blocks(q, k, v, None, scale, None, is_causal=False) for q, k, v in sequences]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(q_TNH: torch.Tensor, cache: LayerCache, part: _Part, scale: float, softcap: float | None) -> torch.Tensor:
    num_rows, (num_tokens, num_heads, head_dim), num_kv_heads = part.num_rows, q_TNH.shape, cache.key.shape[2]
    k_CKH, v_CKH = (part.take(stored, q_TNH.dtype) for stored in cache)
    if num_rows == 1 and num_tokens >= _FEW_TOKENS:
        return _by_blocks(q_TNH, k_CKH, v_CKH, part.mask, scale, softcap, is_causal=part.mask is None)
    k_BKCH, v_BKCH = (x_CKH.view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2) for x_CKH in (k_CKH, v_CKH))
    # The G query heads that share keys, of all of a row's tokens, are the rows of one matrix, so no key is repeated.
    group = num_heads // num_kv_heads
    if num_rows == num_tokens:
        q_BKQH = q_TNH.view(num_rows, num_kv_heads, group, head_dim)
    else:
        q_BKQH = q_TNH.view(-1, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)
    if softcap is not None:
        out_BKQH = _capped_attention(q_BKQH, k_BKCH, v_BKCH, part.mask, scale, softcap).to(q_TNH.dtype)
    elif q_BKQH.shape[2] > 1:
        out_BKQH = F.scaled_dot_product_attention(q_BKQH, k_BKCH, v_BKCH, part.mask, scale=scale)
    else:  # of one query per key head torch's bfloat16 takes 1.8 ms where casting and float32 take 0.3
        q_BKQH, k_BKCH, v_BKCH = q_BKQH.float(), k_BKCH.float(), v_BKCH.float()
        out_BKQH = F.scaled_dot_product_attention(q_BKQH, k_BKCH, v_BKCH, part.mask, scale=scale).to(q_TNH.dtype)
    if num_rows == num_tokens:
        return out_BKQH.reshape(q_TNH.shape)
    return out_BKQH.view(num_kv_heads, group, -1, head_dim).permute(2, 0, 1, 3).reshape(q_TNH.shape)


def _parts(inputs: AttentionInputs, cache: LayerCache, window: int | None, group: int) -> Iterator[_Part]:
    """The rows in order: neighbours of one token together where that is faster, and any other by itself."""
    block_size, *shape = cache.key.shape[1:]
    most_keys = _ONE_CALL_VALUES // math.prod(shape)
    row = begin = 0
    while row < len(inputs.query_lens):
        num_rows = _num_together(inputs, row, most_keys)
        if num_rows > 1:
            yield _together(inputs, begin, slice(row, row + num_rows), window, block_size)
        else:
            yield _alone(inputs, begin, row, window, block_size, group)
        begin += sum(inputs.query_lens[row : row + num_rows])
        row += num_rows


def _num_together(inputs: AttentionInputs, first: int, most_keys: int) -> int:
    """How many rows from this one on go together: of one token each, and without too many keys."""
    longest = count = 0
    for query_len, context_len in zip(inputs.query_lens[first:], inputs.context_lens[first:], strict=True):
        longest = max(longest, context_len)
        if query_len != 1 or not inputs.is_causal or (count + 1) * longest > most_keys:
            break
        count += 1
    return max(count, 1)


def _together(inputs: AttentionInputs, begin: int, rows: slice, window: int | None, block_size: int) -> _Part:
    context_B1 = np.array(inputs.context_lens[rows])[:, None]
    seen_B1 = context_B1 if window is None else np.minimum(context_B1, window)
    number_C = np.arange(seen_B1.max())
    at_BC = np.minimum(context_B1 - seen_B1 + number_C, context_B1 - 1)
    row_B1 = np.arange(len(at_BC))[:, None]
    slots_BC = inputs.block_tables_BL[rows].numpy()[row_B1, at_BC // block_size] * block_size + at_BC % block_size
    mask = None
    if seen_B1.min() < len(number_C):
        mask_BC = np.where(number_C < seen_B1, np.float32(0), np.float32(-np.inf))
        mask = torch.from_numpy(mask_BC[:, None, None])
    return _Part(begin, begin + len(at_BC), len(at_BC), torch.from_numpy(slots_BC.reshape(-1)), None, mask)


def _alone(inputs: AttentionInputs, begin: int, row: int, window: int | None, block_size: int, group: int) -> _Part:
    query_len, context_len = inputs.query_lens[row], inputs.context_lens[row]
    first = reference.first_seen(query_len, context_len, window, inputs)
    low = first // block_size
    blocks_L = inputs.block_tables_BL[row, low : -(-context_len // block_size)]
    span = slice(first - low * block_size, context_len - low * block_size)
    sees_all = inputs.is_causal and (window is None or window >= context_len)
    if sees_all and 1 < query_len < _FEW_TOKENS:
        mask_GTC = torch.full((group, query_len, context_len), -torch.inf)
        mask = mask_GTC.triu_(context_len - query_len + 1).flatten(0, 1)
    else:
        mask = reference.seen_mask(query_len, context_len, first, window, inputs, begin, torch.device("cpu"))
        if mask is not None and query_len < _FEW_TOKENS:
            mask = torch.where(mask, 0.0, -torch.inf).repeat(group, 1)
    return _Part(begin, begin + query_len, 1, blocks_L, span, mask)


def _capped_attention(
    q_BKQH: torch.Tensor,
    k_BKCH: torch.Tensor,
    v_BKCH: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """In float32 whatever the dtype; torch's own attention cannot bend scores."""
    scores_BKQC = q_BKQH.float() @ k_BKCH.float().transpose(-1, -2) * scale
    scores_BKQC = torch.tanh(scores_BKQC / softcap) * softcap
    return (scores_BKQC if mask is None else scores_BKQC + mask).softmax(-1) @ v_BKCH.float()


def _by_blocks(
    q_TNH: torch.Tensor,
    k_CKH: torch.Tensor,
    v_CKH: torch.Tensor,
    mask_TC: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    *,
    is_causal: bool,
) -> torch.Tensor:
    """Blocks of queries against all keys that any of them sees: (T, N, H).

    Args:
        is_causal: T equals C, and each token sees those up to itself; without a mask.
    """
    num_tokens, num_heads, _ = q_TNH.shape
    num_keys, num_kv_heads, _ = k_CKH.shape
    group = num_heads // num_kv_heads
    q_TKGH = q_TNH.unflatten(1, (num_kv_heads, group))
    out_TKGH = torch.empty_like(q_TKGH, memory_format=torch.contiguous_format)
    # oneDNN has no float16 on most CPUs. Probabilities may be rounded to the values' dtype; scores may not.
    product_dtype = torch.bfloat16 if v_CKH.dtype == torch.bfloat16 else torch.float32
    step = max(1, _BLOCK_ROWS // group)
    for kv_head in range(num_kv_heads):
        k_CH = padded(k_CKH[:, kv_head].float()).contiguous()
        v_HC = padded(v_CKH[:, kv_head].to(product_dtype)).t().contiguous()
        for begin in range(0, num_tokens, step):
            end = min(begin + step, num_tokens)
            seen = min(bucket(end), len(k_CH)) if is_causal else len(k_CH)
            q_TGH = q_TKGH[begin:end, kv_head].float() * scale
            scores_TGC = product(q_TGH.flatten(0, 1), k_CH[:seen]).unflatten(0, (-1, group))
            if softcap is not None:
                scores_TGC = scores_TGC.div_(softcap).tanh_().mul_(softcap)
            if is_causal:
                own_TGT = scores_TGC[..., begin:]
                later_TT = torch.ones(end - begin, seen - begin, dtype=torch.bool).triu_(1)
                own_TGT.masked_fill_(later_TT.unsqueeze(1), -torch.inf)
            else:
                scores_TGC[..., num_keys:] = -torch.inf
                if mask_TC is not None:
                    scores_TGC[..., :num_keys].masked_fill_(~mask_TC[begin:end].unsqueeze(1), -torch.inf)
            share_TGC = scores_TGC.softmax(-1).to(product_dtype)
            out_TKGH[begin:end, kv_head] = product(share_TGC.flatten(0, 1), v_HC[:, :seen].contiguous()).unflatten(
                0, (-1, group)
            )
    return out_TKGH.flatten(1, 2)
