"""Attention over the paged cache, for decode rows, prefill chunks and mixtures of both, in one launch.

A program takes one key head and a block of query rows of one request; the query heads that share the key head are rows
of the same block (grouped-query attention), so each key is loaded once for all of them. Online softmax as in
FlashAttention-2, arXiv:2307.08691. Where requests have more than a token each, which of them a program belongs to is
found on the device by bisection, so that nothing is copied there.

Long contexts of few requests leave most of the chip idle: decode rows are then split along their keys, and a second
launch joins the parts (Flash-Decoding).

On Hopper prompts have a kernel of their own, ``paged_hopper``, where it suits; the one here then takes the rows of one
token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.triton.device import hopper_kernel
from opsin.kernels.triton.overlap import can_overlap, follow

_LOG2_E = 1.4426950408889634
_KEYS_PER_SPLIT = 256
_MAX_SPLITS = 32
_PROGRAMS_WANTED = 264  # two for each of an H100's 132 multiprocessors


# Numbers that change from step to step are not specialised: else Triton compiles a kernel for each of 1, multiples of
# 16 and the rest, in the midst of serving. None gains by it: they bound a search, or find single entries of tables.
@triton.jit(do_not_specialize=["num_rows", "table_stride", "num_splits"])
def _attention_kernel(
    q_ptr, key_ptr, value_ptr, out_ptr, partial_ptr, lse_ptr, table_ptr, start_ptr, context_ptr, visible_ptr, begin_ptr,
    num_rows, table_stride, num_splits, q_stride_t, q_stride_h, scale_log2, cap_log2, window,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_VISIBLE: tl.constexpr, HAS_BEGIN: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SPLITS: tl.constexpr, IS_DECODE: tl.constexpr, HAS_OTHERS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if IS_DECODE:
        row = program
        first = program
        query_len = 1
        begin = 0
        if HAS_OTHERS:  # behind the rows of one token come others, which are not for this launch
            if tl.load(start_ptr + row + 1) != row + 1:
                return
    else:
        # Row r owns programs from start[r] // BLOCK_Q + r on: at least one each, and enough for its queries.
        low = 0
        high = num_rows
        while low < high:
            middle = (low + high) // 2
            if tl.load(start_ptr + middle) // BLOCK_Q + middle <= program:
                low = middle + 1
            else:
                high = middle
        row = low - 1
        first = tl.load(start_ptr + row)
        query_len = tl.load(start_ptr + row + 1) - first
        begin = (program - (first // BLOCK_Q + row)) * BLOCK_Q
        if begin >= query_len:
            return
    context = tl.load(context_ptr + row)

    m = tl.arange(0, BLOCK_M)
    token = begin + m // GROUP
    is_query = (m < BLOCK_Q * GROUP) & (token < query_len)
    head = kv_head * GROUP + m % GROUP
    flat = (first + token).to(tl.int64)
    position = context - query_len + token
    if HAS_VISIBLE:
        visible = tl.load(visible_ptr + flat, mask=is_query, other=0)
    else:
        visible = tl.where(is_query, position + 1, 0)
    h = tl.arange(0, BLOCK_H)
    in_head = h < SIZE
    q_mask = is_query[:, None] & in_head[None, :]
    q = tl.load(q_ptr + flat[:, None] * q_stride_t + head[:, None] * q_stride_h + h[None, :], mask=q_mask, other=0.0)

    key_end = tl.max(visible, axis=0)
    key_begin = 0
    if HAS_WINDOW:
        oldest = position - window + 1
        if HAS_BEGIN:
            oldest = tl.minimum(oldest, tl.load(begin_ptr + flat, mask=is_query, other=0))
        key_begin = tl.maximum(tl.min(tl.where(is_query, oldest, context), axis=0), 0) // BLOCK_N * BLOCK_N
    if HAS_SPLITS:  # by the row's own context, which only the device knows where the launch is replayed
        split_keys = tl.cdiv(tl.cdiv(context, num_splits), BLOCK_N) * BLOCK_N
        key_begin = tl.maximum(key_begin, split * split_keys)
        key_end = tl.minimum(key_end, (split + 1) * split_keys)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for n_begin in range(key_begin, key_end, BLOCK_N):
        n = n_begin + tl.arange(0, BLOCK_N)
        in_range = n < key_end
        page = tl.load(table_ptr + row * table_stride + n // PAGE, mask=in_range, other=0).to(tl.int64)
        base = ((page * PAGE + n % PAGE) * NUM_KV + kv_head) * SIZE
        kv_mask = in_range[:, None] & in_head[None, :]
        key = tl.load(key_ptr + base[:, None] + h[None, :], mask=kv_mask, other=0.0).to(q.dtype)
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale_log2
        if HAS_CAP:  # the scale holds 1 / cap in place of log2(e); tanh(x) is 2 sigmoid(2 x) - 1
            score = cap_log2 * (2.0 * tl.sigmoid(2.0 * score) - 1.0)
        seen = in_range[None, :] & (n[None, :] < visible[:, None])
        if HAS_WINDOW:
            seen = seen & (n[None, :] >= oldest[:, None])
        score = tl.where(seen, score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1))
        # A row that has seen nothing yet has -inf as its best; 0 stands in, so that no -inf - -inf arises.
        reference = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(score - reference[:, None])
        fade = tl.exp2(best - reference)
        total = total * fade + tl.sum(weight, axis=1)
        value = tl.load(value_ptr + base[:, None] + h[None, :], mask=kv_mask, other=0.0).to(q.dtype)
        acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        best = new_best

    safe = tl.where(total == 0.0, 1.0, total)
    result = acc / safe[:, None]
    place = flat * (NUM_KV * GROUP) + head
    if HAS_SPLITS:
        tl.store(partial_ptr + (place * num_splits + split)[:, None] * SIZE + h[None, :], result, mask=q_mask)
        lse = tl.where(total == 0.0, float("-inf"), best + tl.log2(safe))
        tl.store(lse_ptr + place * num_splits + split, lse, mask=is_query)
    else:
        tl.store(out_ptr + place[:, None] * SIZE + h[None, :], result.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["num_splits"])
def _join_kernel(
    partial_ptr, lse_ptr, out_ptr, num_splits, SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    place = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    h = tl.arange(0, BLOCK_H)
    lse = tl.load(lse_ptr + place * num_splits + s, mask=s < num_splits, other=float("-inf"))
    best = tl.max(lse, axis=0)
    # A row without a context, as pads a captured batch, has -inf everywhere: its result is 0, and no NaN is written.
    weight = tl.exp2(lse - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(weight, axis=0)
    weight = weight / tl.where(total == 0.0, 1.0, total)
    mask = (s < num_splits)[:, None] & (h < SIZE)[None, :]
    part = tl.load(partial_ptr + (place * num_splits + s)[:, None] * SIZE + h[None, :], mask=mask, other=0.0)
    result = tl.sum(part * weight[:, None], axis=0)
    tl.store(out_ptr + place * SIZE + h, result.to(out_ptr.dtype.element_ty), mask=h < SIZE)


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
    """As ``reference.paged_attention``; keys and values are read from the cache alone."""
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    if inputs.is_decode:
        _launch(q_TNH, out_TNH, cache, inputs, scale, window, softcap, is_decode=True)
        return out_TNH
    is_plain = window is None and softcap is None and inputs.visible_end_T is None
    hopper = hopper_kernel("paged_hopper", q_TNH.device) if is_plain else None
    if hopper is not None and hopper.suits(q_TNH, cache):
        has_singles = 1 in inputs.query_lens
        if has_singles:  # ahead of the others: an empty row may write zeros where the next one begins
            _launch(q_TNH, out_TNH, cache, inputs, scale, is_decode=True, has_others=True)
        hopper.launch(q_TNH, out_TNH, cache, inputs, scale, skips_singles=has_singles)
    else:
        _launch(q_TNH, out_TNH, cache, inputs, scale, window, softcap, is_decode=False)
    return out_TNH


def _launch(
    q_TNH: torch.Tensor,
    out_TNH: torch.Tensor,
    cache: LayerCache,
    inputs: AttentionInputs,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    is_decode: bool,
    has_others: bool = False,
) -> None:
    """Attention of all rows.

    Args:
        is_decode: every row has one token.
        has_others: or only those that stand before all others have; the others are left out.
    """
    num_tokens, num_heads, size = q_TNH.shape
    num_kv = cache.key.shape[2]
    group = num_heads // num_kv
    num_rows = len(inputs.query_lens)
    # Tall blocks for prefill; for decode, no taller than the tensor cores' 16 rows need.
    longest_query = 1 if is_decode else max(inputs.query_lens)
    block_m = 16 if longest_query * group <= 16 else (64 if size > 128 else 128)
    block_m = max(block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    block_n = 32 if size > 128 or q_TNH.dtype == torch.float32 else 64
    num_programs = num_rows if is_decode else num_tokens // block_q + num_rows
    num_splits = 1
    if is_decode and not has_others:
        wanted = triton.cdiv(_PROGRAMS_WANTED, num_rows * num_kv)
        possible = triton.cdiv(max(inputs.context_lens), _KEYS_PER_SPLIT)
        num_splits = triton.next_power_of_2(max(1, min(wanted, possible, _MAX_SPLITS)))

    partial = lse = out_TNH
    if num_splits > 1:
        shape = (num_tokens, num_heads, num_splits)
        partial = torch.empty((*shape, size), dtype=torch.float32, device=q_TNH.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q_TNH.device)
    block_h = max(16, triton.next_power_of_2(size))
    overlaps = can_overlap(q_TNH.device)
    visible, begin = inputs.visible_end_T, inputs.visible_begin_T
    _attention_kernel[(num_programs, num_kv, num_splits)](
        q_TNH, cache.key, cache.value, out_TNH, partial, lse,
        inputs.block_tables_BL, inputs.query_start_B1, inputs.context_lens_B,
        inputs.query_start_B1 if visible is None else visible, inputs.query_start_B1 if begin is None else begin,
        num_rows, inputs.block_tables_BL.stride(0), num_splits, q_TNH.stride(0), q_TNH.stride(1),
        scale * _LOG2_E if softcap is None else scale / softcap, (softcap or 0.0) * _LOG2_E, window or 0,
        NUM_KV=num_kv, GROUP=group, SIZE=size, PAGE=cache.key.shape[1], BLOCK_Q=block_q,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_H=block_h,
        HAS_WINDOW=window is not None, HAS_VISIBLE=visible is not None, HAS_BEGIN=begin is not None,
        HAS_CAP=softcap is not None, HAS_SPLITS=num_splits > 1, IS_DECODE=is_decode, HAS_OTHERS=has_others,
        PRECISION="ieee" if q_TNH.dtype == torch.float32 else "tf32",
        PDL=overlaps, launch_pdl=overlaps, num_warps=4 if block_m <= 64 else 8, num_stages=2,
    )  # fmt: skip
    if num_splits > 1:
        _join_kernel[(num_tokens * num_heads,)](
            partial, lse, out_TNH, num_splits, SIZE=size, BLOCK_H=block_h, BLOCK_S=max(8, num_splits),
            PDL=overlaps, launch_pdl=overlaps, num_warps=2,
        )  # fmt: skip
