"""Attention of vision towers on Hopper, with the schedule of ``hopper``.

One H100, pictures of 4,000 patches: 471 TFLOP/s with heads of 80 and 642 with heads of 128, where the kernel in
``varlen`` reaches 405 and 444.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from opsin.kernels.triton.hopper import (
    BLOCK_M,
    BLOCK_N,
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    CONSUMERS,
    LOG2_E,
    PRODUCER_REGISTERS,
    REGISTERS,
    STAGES,
    allocate,
    allocate_barriers,
    attend,
    following,
    memory_layout,
    product_layout,
)

_LARGEST_KEPT = 80  # size of heads up to which a consumer has registers for its queries, too


def suits(num_patches: int, num_heads: int, num_multiprocessors: int) -> bool:
    """There are so many tiles that a chip which is half empty in the last round of them matters little."""
    return num_patches * num_heads >= 4 * num_multiprocessors * BLOCK_M


@gluon.jit
def _describe(source, length, SIZE: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of one picture and head: past its end the copy engine supplies zeros, and reads nothing of the neighbours."""
    ptr, stride_t = source
    dtype: gl.constexpr = ptr.dtype.element_ty
    main_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, MAIN], dtype)
    main = tma.make_tensor_descriptor(ptr, [length, SIZE], [stride_t, 1], [BLOCK_N, MAIN], main_layout)
    if REST > 0:
        rest_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, REST], dtype)
        rest = tma.make_tensor_descriptor(ptr, [length, SIZE], [stride_t, 1], [BLOCK_N, REST], rest_layout)
        return main, rest
    else:
        return main, main


@gluon.jit
def _fetch(
    descriptors, block, num_blocks, full, buffers, stage,
    MAIN: gl.constexpr, REST: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Ask for a block, counted from the picture's end; for nothing past its beginning."""
    main, rest = descriptors
    main_to, rest_to = buffers
    bar = full.index(stage)
    n = (num_blocks - 1 - block) * BLOCK_N
    exists = block < num_blocks
    if REST > 0:
        mbarrier.expect(bar, main.block_type.nbytes + rest.block_type.nbytes, pred=exists)
        tma.async_copy_global_to_shared(main, [n, 0], bar, main_to.index(stage), pred=exists)
        tma.async_copy_global_to_shared(rest, [n, MAIN], bar, rest_to.index(stage), pred=exists)
    else:
        mbarrier.expect(bar, main.block_type.nbytes, pred=exists)
        tma.async_copy_global_to_shared(main, [n, 0], bar, main_to.index(stage), pred=exists)


@gluon.jit
def _produce(
    task, memory,
    SIZE: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _, _, sources, _, length, num_blocks, _ = task
    _, keys, values, full, empty = memory
    key_source, value_source = sources
    keys_full, values_full = full
    keys_empty, values_empty = empty
    of_keys = _describe(key_source, length, SIZE, MAIN, REST, BLOCK_N)
    _fetch(of_keys, 0, num_blocks, keys_full, keys, 0, MAIN, REST, BLOCK_N)
    of_values = _describe(value_source, length, SIZE, MAIN, REST, BLOCK_N)
    _fetch(of_values, 0, num_blocks, values_full, values, 0, MAIN, REST, BLOCK_N)
    stage, phase = following(0, 1, STAGES)  # a wait for the phase before the first one ends at once
    for block in range(1, num_blocks):
        mbarrier.wait(keys_empty.index(stage), phase)
        _fetch(of_keys, block, num_blocks, keys_full, keys, stage, MAIN, REST, BLOCK_N)
        mbarrier.wait(values_empty.index(stage), phase)
        _fetch(of_values, block, num_blocks, values_full, values, stage, MAIN, REST, BLOCK_N)
        stage, phase = following(stage, phase, STAGES)


@gluon.jit
def _consume(
    task, memory,
    SIZE: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    KEEP_QUERIES: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    q_source, out_target, _, begin, length, num_blocks, scale_log2 = task
    queries, keys, values, full, empty = memory
    q_ptr, q_stride_t = q_source
    out_ptr, out_stride_t = out_target
    main_queries, rest_queries = queries
    warps: gl.constexpr = gl.num_warps()
    rows: gl.constexpr = 16 * warps
    main_memory: gl.constexpr = memory_layout(MAIN, warps)
    rest_memory: gl.constexpr = memory_layout(REST, warps)
    score_layout: gl.constexpr = product_layout(BLOCK_N, warps)

    begin += INDEX * rows
    main_q = main_queries.index(INDEX)
    main_m = (begin + gl.arange(0, rows, gl.SliceLayout(1, main_memory)))[:, None]
    main_h = gl.arange(0, MAIN, gl.SliceLayout(0, main_memory))[None, :]
    main_at = main_m * q_stride_t + main_h
    main_q.store(gl.load(q_ptr + main_at, mask=(main_m < length) & (main_h < SIZE), other=0.0))
    rest_q = rest_queries.index(INDEX)
    if REST > 0:
        rest_m = (begin + gl.arange(0, rows, gl.SliceLayout(1, rest_memory)))[:, None]
        rest_h = MAIN + gl.arange(0, REST, gl.SliceLayout(0, rest_memory))[None, :]
        rest_at = rest_m * q_stride_t + rest_h
        rest_q.store(gl.load(q_ptr + rest_at, mask=(rest_m < length) & (rest_h < SIZE), other=0.0))
    fence_async_shared()

    visible = gl.full([rows], 0, gl.int32, gl.SliceLayout(1, score_layout)) + length
    attend(
        (main_q, rest_q), (keys, values, full, empty), (0, 0), (num_blocks, 1, BLOCK_N), visible, scale_log2,
        MAIN, REST, BLOCK_N, STAGES, KEEP_QUERIES, False,
    )  # fmt: skip

    main_m = (begin + gl.arange(0, rows, gl.SliceLayout(1, main_memory)))[:, None]
    main_h = gl.arange(0, MAIN, gl.SliceLayout(0, main_memory))[None, :]
    main_at = main_m * out_stride_t + main_h
    gl.store(out_ptr + main_at, main_q.load(main_memory), mask=(main_m < length) & (main_h < SIZE))
    if REST > 0:
        rest_m = (begin + gl.arange(0, rows, gl.SliceLayout(1, rest_memory)))[:, None]
        rest_h = MAIN + gl.arange(0, REST, gl.SliceLayout(0, rest_memory))[None, :]
        rest_at = rest_m * out_stride_t + rest_h
        gl.store(out_ptr + rest_at, rest_q.load(rest_memory), mask=(rest_m < length) & (rest_h < SIZE))


@gluon.jit(do_not_specialize=["num_rows"])  # it bounds a search
def _varlen_hopper_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, start_ptr, num_rows, scale_log2,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, out_stride_t,
    SIZE: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, KEEP_QUERIES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = 16 * gl.num_warps()
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    program = gl.program_id(0)
    head = gl.program_id(1)
    # Row r owns programs from start[r] // BLOCK_M + r on: at least one each, and enough for its queries.
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        if gl.load(start_ptr + middle) // BLOCK_M + middle <= program:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    first = gl.load(start_ptr + row)
    length = gl.load(start_ptr + row + 1) - first
    begin = (program - (first // BLOCK_M + row)) * BLOCK_M
    if begin >= length:
        return
    first = first.to(gl.int64)
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    v_ptr += first * v_stride_t + head * v_stride_h
    out_ptr += first * out_stride_t + head * SIZE
    num_blocks = gl.cdiv(length, BLOCK_N)

    dtype: gl.constexpr = k_ptr.dtype.element_ty
    queries = allocate(dtype, CONSUMERS, ROWS, MAIN, REST)
    keys = allocate(dtype, STAGES, BLOCK_N, MAIN, REST)
    values = allocate(dtype, STAGES, BLOCK_N, MAIN, REST)
    full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, CONSUMERS)
    sources = ((k_ptr, k_stride_t), (v_ptr, v_stride_t))
    task = ((q_ptr, q_stride_t), (out_ptr, out_stride_t), sources, begin, length, num_blocks, scale_log2)
    memory = (queries, keys, values, full, empty)
    gl.static_assert(CONSUMERS == 3)  # as many as are listed here
    gl.warp_specialize([
        (_consume, (task, memory, SIZE, MAIN, REST, BLOCK_N, STAGES, KEEP_QUERIES, 0)),
        (_consume, (task, memory, SIZE, MAIN, REST, BLOCK_N, STAGES, KEEP_QUERIES, 1)),
        (_consume, (task, memory, SIZE, MAIN, REST, BLOCK_N, STAGES, KEEP_QUERIES, 2)),
        (_produce, (task, memory, SIZE, MAIN, REST, BLOCK_N, STAGES)),
    ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def launch(
    q_PNH: torch.Tensor,
    k_PNH: torch.Tensor,
    v_PNH: torch.Tensor,
    cu_seqlens_B1: torch.Tensor,
    scale: float,
    parts: tuple[int, int],
    *,
    keep_queries: bool | None = None,
) -> torch.Tensor:
    """``varlen_attention`` in 16 bits, of addressable keys and values; ``parts`` are ``head_parts`` of the head size.

    Queries are kept in registers rather than in shared memory where there are enough, or as ``keep_queries`` says.
    Descriptors take memory that Triton's allocator of this thread supplies.
    """
    num_patches, num_heads, size = q_PNH.shape
    num_rows = len(cu_seqlens_B1) - 1
    out_PNH = torch.empty((num_patches, num_heads, size), dtype=q_PNH.dtype, device=q_PNH.device)
    _varlen_hopper_kernel[(num_patches // BLOCK_M + num_rows, num_heads)](
        q_PNH, k_PNH, v_PNH, out_PNH, cu_seqlens_B1, num_rows, scale * LOG2_E,
        q_PNH.stride(0), q_PNH.stride(1), k_PNH.stride(0), k_PNH.stride(1), v_PNH.stride(0), v_PNH.stride(1),
        num_heads * size, SIZE=size, MAIN=parts[0], REST=parts[1], CONSUMERS=CONSUMERS,
        BLOCK_N=BLOCK_N, STAGES=STAGES, KEEP_QUERIES=size <= _LARGEST_KEPT if keep_queries is None else keep_queries,
        num_warps=CONSUMER_WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return out_PNH
