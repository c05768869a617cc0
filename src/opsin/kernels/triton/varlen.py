"""Attention of vision towers: every patch sees its whole picture, pictures packed one behind the other.

Online softmax as in FlashAttention-2, arXiv:2307.08691; keys and values come through the bulk tensor copy engine, which
also supplies the zeros past a picture's end. Head sizes of towers (72, 80, 88, 96) are no powers of two, and padding 80
to 128 would waste 3/8 of the products; so a head is taken in two parts, 64 + 16 here, with a product each. On an H100
that reaches 400 TFLOP/s for pictures of 4,000 patches with heads of 80, against 280 padded to 128 and 240 for torch's
``varlen_attn``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opsin.kernels import reference
from opsin.kernels.triton.device import hopper_kernel, num_multiprocessors

_LOG2_E = 1.4426950408889634
_BLOCK_M, _BLOCK_N = 128, 64
_HOPPER_SIZES = range(64, 129)  # of heads, that ``varlen_hopper`` was written for


@triton.jit(do_not_specialize=["num_rows"])  # it bounds a search
def _varlen_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, start_ptr, num_rows, scale_log2,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, out_stride_t,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = tl.program_id(1)
    # Row r owns programs from start[r] // BLOCK_M + r on: at least one each, and enough for its queries.
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(start_ptr + middle) // BLOCK_M + middle <= program:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    first = tl.load(start_ptr + row)
    length = tl.load(start_ptr + row + 1) - first
    begin = (program - (first // BLOCK_M + row)) * BLOCK_M
    if begin >= length:
        return
    first = first.to(tl.int64)
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    v_ptr += first * v_stride_t + head * v_stride_h
    out_ptr += first * out_stride_t + head * SIZE
    # Each picture has descriptors of its own, so that nothing of its neighbours, not even their NaNs, is read.
    main_keys = tl.make_tensor_descriptor(k_ptr, [length, SIZE], [k_stride_t, 1], [BLOCK_N, MAIN])
    main_values = tl.make_tensor_descriptor(v_ptr, [length, SIZE], [v_stride_t, 1], [BLOCK_N, MAIN])
    m = begin + tl.arange(0, BLOCK_M)
    is_query = (m < length)[:, None]
    main = tl.arange(0, MAIN)[None, :]
    q_at = q_ptr + m[:, None] * q_stride_t
    main_q = tl.load(q_at + main, mask=is_query & (main < SIZE), other=0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    main_acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    if REST > 0:
        rest_keys = tl.make_tensor_descriptor(k_ptr, [length, SIZE], [k_stride_t, 1], [BLOCK_N, REST])
        rest_values = tl.make_tensor_descriptor(v_ptr, [length, SIZE], [v_stride_t, 1], [BLOCK_N, REST])
        rest = MAIN + tl.arange(0, REST)[None, :]
        rest_q = tl.load(q_at + rest, mask=is_query & (rest < SIZE), other=0.0)
        rest_acc = tl.zeros([BLOCK_M, REST], tl.float32)

    for n in range(0, length, BLOCK_N):
        score = tl.dot(main_q, main_keys.load([n, 0]).T)
        if REST > 0:
            score = tl.dot(rest_q, rest_keys.load([n, MAIN]).T, score)
        if n + BLOCK_N > length:
            score = tl.where((n + tl.arange(0, BLOCK_N) < length)[None, :], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1) * scale_log2)
        weight = tl.exp2(score * scale_log2 - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weight, axis=1)
        rounded = weight.to(main_q.dtype)
        main_acc = tl.dot(rounded, main_values.load([n, 0]), main_acc * fade[:, None])
        if REST > 0:
            rest_acc = tl.dot(rounded, rest_values.load([n, MAIN]), rest_acc * fade[:, None])
        best = new_best

    inverse = (1.0 / total)[:, None]
    dtype = out_ptr.dtype.element_ty
    out_at = out_ptr + m[:, None] * out_stride_t
    tl.store(out_at + main, (main_acc * inverse).to(dtype), mask=is_query & (main < SIZE))
    if REST > 0:
        tl.store(out_at + rest, (rest_acc * inverse).to(dtype), mask=is_query & (rest < SIZE))


def head_parts(size: int) -> tuple[int, int]:
    """A head size as two powers of two, the second 0 where the first is enough: (64, 16) for 72 and 80."""
    whole = max(16, triton.next_power_of_2(size))
    if whole <= size or whole < 64:
        return whole, 0
    rest = max(16, triton.next_power_of_2(size - whole // 2))
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def varlen_attention(
    q_PNH: torch.Tensor,
    k_PNH: torch.Tensor,
    v_PNH: torch.Tensor,
    cu_seqlens_B1: torch.Tensor,
    seq_lens: tuple[int, ...] | None,
    scale: float,
) -> torch.Tensor:
    """As ``reference.varlen_attention``; reads queries, keys and values in place, from the fused projection.

    Full precision, and memory that the copy engine cannot address, are left to the reference.
    """
    num_patches, num_heads, size = q_PNH.shape
    if not num_patches or q_PNH.dtype == torch.float32 or not (_is_addressable(k_PNH) and _is_addressable(v_PNH)):
        return reference.varlen_attention(q_PNH, k_PNH, v_PNH, cu_seqlens_B1, seq_lens, scale)
    assert q_PNH.stride(2) == 1
    main, rest = head_parts(size)
    triton.set_allocator(allocate)  # of this thread
    hopper = hopper_kernel("varlen_hopper", q_PNH.device) if size in _HOPPER_SIZES else None
    if hopper is not None and hopper.suits(num_patches, num_heads, num_multiprocessors(q_PNH.device)):
        return hopper.launch(q_PNH, k_PNH, v_PNH, cu_seqlens_B1, scale, (main, rest))
    out_PNH = torch.empty((num_patches, num_heads, size), dtype=q_PNH.dtype, device=q_PNH.device)
    num_rows = len(cu_seqlens_B1) - 1
    _varlen_kernel[(num_patches // _BLOCK_M + num_rows, num_heads)](
        q_PNH, k_PNH, v_PNH, out_PNH, cu_seqlens_B1, num_rows, scale * _LOG2_E,
        q_PNH.stride(0), q_PNH.stride(1), k_PNH.stride(0), k_PNH.stride(1), v_PNH.stride(0), v_PNH.stride(1),
        num_heads * size, SIZE=size, MAIN=main, REST=rest, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out_PNH


def _is_addressable(x_PNH: torch.Tensor) -> bool:
    """Rows and heads begin at multiples of 16 bytes."""
    per_unit = 16 // x_PNH.element_size()
    return x_PNH.stride(2) == 1 and all(
        value % per_unit == 0 for value in (x_PNH.stride(0), x_PNH.stride(1), x_PNH.storage_offset())
    )


def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Device memory for the kernels' descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
