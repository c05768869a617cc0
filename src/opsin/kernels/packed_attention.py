"""Attention on a CPU as oneDNN's matrix products.

torch's own attention runs both of its products at a fraction of what oneDNN's linear layers reach: 1024 tokens of one
64-wide head take 3.4 ms in bfloat16 and 3.2 in float32, here 1.5 and 1.7 (one Zen 5 core, torch 2.13). Scores and
softmax are float32 whatever the dtype. Few tokens leave too little work to gain from, so they stay with torch's; the
rows of a short decode step in one call, rather than a call each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from opsin.kernels import reference
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.onednn import bucket, padded, product

_BLOCK_ROWS = 512  # queries, times heads that share keys, whose scores are in memory at once
_FEW_TOKENS = 192  # sequences that torch's own attention takes as fast
_ONE_CALL_VALUES = 2**19  # gathered values of keys up to which one call is faster; with more, rows evict one another


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
    if softcap is None and _fits_one_call(inputs, window, cache.key[0, 0].numel()):
        return _decode(q_TNH, cache, inputs, scale)

    def attend(
        q_TNH: torch.Tensor, k_CKH: torch.Tensor, v_CKH: torch.Tensor, mask_TC: torch.Tensor | None
    ) -> torch.Tensor:
        if len(q_TNH) < _FEW_TOKENS:
            is_single = len(q_TNH) == 1 and q_TNH.shape[1] == k_CKH.shape[1]
            if is_single:  # of one query per key head torch's bfloat16 takes 1.8 ms where casting and float32 take 0.3
                q_TNH, k_CKH, v_CKH = q_TNH.float(), k_CKH.float(), v_CKH.float()
            return reference.row_attention(q_TNH, k_CKH, v_CKH, mask_TC, scale, softcap)
        return _by_blocks(q_TNH, k_CKH, v_CKH, mask_TC, scale, softcap, is_causal=mask_TC is None)

    return reference.attend_rows(q_TNH, k_TKH, v_TKH, cache, inputs, window, attend)


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


def _fits_one_call(inputs: AttentionInputs, window: int | None, values_per_key: int) -> bool:
    if not inputs.is_decode or inputs.visible_end_T is not None or inputs.visible_begin_T is not None:
        return False
    longest = max(inputs.context_lens)
    has_edge = window is not None and longest > window
    return not has_edge and longest * len(inputs.context_lens) * values_per_key <= _ONE_CALL_VALUES


def _decode(q_BNH: torch.Tensor, cache: LayerCache, inputs: AttentionInputs, scale: float) -> torch.Tensor:
    """One token per row. The query heads that share keys are the rows of one small matrix, so no key is repeated."""
    num_rows, num_heads, head_dim = q_BNH.shape
    block_size, num_kv_heads = cache.key.shape[1:3]
    longest = max(inputs.context_lens)
    blocks = inputs.block_tables_BL[:, : -(-longest // block_size)].reshape(-1)
    shape = (num_rows, -1, num_kv_heads, head_dim)
    gathered = [reference.take_blocks(stored, blocks).to(q_BNH.dtype).view(shape) for stored in cache]
    mask = None
    if longest > min(inputs.context_lens):
        mask = (torch.arange(longest) < inputs.context_lens_B.unsqueeze(1))[:, None, None]
        for row, length in enumerate(inputs.context_lens):  # row by row: a tenth of what a masked fill of all takes
            for stored_BCKH in gathered:  # there may be NaN there, and 0 * NaN is NaN
                stored_BCKH[row, length:].zero_()
    k_BKCH, v_BKCH = (stored_BCKH[:, :longest].transpose(1, 2) for stored_BCKH in gathered)
    q_BKGH = q_BNH.reshape(num_rows, num_kv_heads, -1, head_dim)
    out_BKGH = F.scaled_dot_product_attention(q_BKGH, k_BKCH, v_BKCH, attn_mask=mask, scale=scale)
    return out_BKGH.reshape(num_rows, num_heads, head_dim)


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
