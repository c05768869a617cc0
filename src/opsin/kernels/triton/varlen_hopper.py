"""Attention of vision towers on Hopper (sm_90): softmax runs while the tensor cores multiply.

The schedule is FlashAttention-3's, arXiv:2407.08608, sections 3.1 and 3.2, in Gluon, Triton's language of explicit
layouts, barriers and asynchronous products. A warp of its own brings keys and values through the bulk tensor copy
engine; each consumer, a group of four warps, has 64 queries. A consumer asks for the scores of the next block of keys
and for the products of this block's weights with their values at once, waits for the scores only, and computes the
next weights while the values are multiplied. Blocks are taken from a picture's end to its beginning: only the first
one taken holds keys past the end, so that no other is masked.

One H100, pictures of 4,000 patches: 471 TFLOP/s with heads of 80 and 642 with heads of 128, where the kernel in
``varlen`` reaches 405 and 444.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_LOG2_E = 1.4426950408889634
_CONSUMERS = 3
_CONSUMER_WARPS = 4
_BLOCK_M = 16 * _CONSUMER_WARPS * _CONSUMERS
_BLOCK_N, _STAGES = 64, 4
_REGISTERS = 128  # of a thread at the start, the same for all
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = gl.constexpr(160), gl.constexpr(24)  # from when each knows what it is
_LARGEST_KEPT = 80  # size of heads up to which a consumer has registers for its queries, too


def suits(num_patches: int, num_heads: int, num_multiprocessors: int) -> bool:
    """There are so many tiles that a chip which is half empty in the last round of them matters little."""
    return num_patches * num_heads >= 4 * num_multiprocessors * _BLOCK_M


@gluon.constexpr_function
def _product_layout(width, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, max(width, 16), 16])


@gluon.constexpr_function
def _memory_layout(width, warps):
    width = max(width, 16)
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [warps, 1], [1, 0])


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wraps = stage == STAGES
    return gl.where(wraps, 0, stage), gl.where(wraps, phase ^ 1, phase)


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
def _allocate(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr):
    main_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, MAIN], dtype)
    main = gl.allocate_shared_memory(dtype, [COUNT, ROWS, MAIN], main_layout)
    if REST > 0:
        rest_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, REST], dtype)
        return main, gl.allocate_shared_memory(dtype, [COUNT, ROWS, REST], rest_layout)
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
    stage, phase = _next(0, 1, STAGES)  # a wait for the phase before the first one ends at once
    for block in range(1, num_blocks):
        mbarrier.wait(keys_empty.index(stage), phase)
        _fetch(of_keys, block, num_blocks, keys_full, keys, stage, MAIN, REST, BLOCK_N)
        mbarrier.wait(values_empty.index(stage), phase)
        _fetch(of_values, block, num_blocks, values_full, values, stage, MAIN, REST, BLOCK_N)
        stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _scores(main_q, rest_q, keys, stage, zero, REST: gl.constexpr):
    main_k, rest_k = keys
    score = warpgroup_mma(main_q, main_k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if REST > 0:
        score = warpgroup_mma(rest_q, rest_k.index(stage).permute((1, 0)), score, is_async=True)
    return score


@gluon.jit
def _own_sum(weight):
    """Of each thread's own columns: threads are added up once, at the end."""
    rows: gl.constexpr = weight.shape[0]
    eights: gl.constexpr = weight.shape[1] // 8
    return gl.sum(gl.sum(weight.reshape([rows, eights, 4, 2]), axis=3), axis=1)


@gluon.jit
def _times_rows(x, factor):
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


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
    keys_full, values_full = full
    keys_empty, values_empty = empty
    main_queries, rest_queries = queries
    main_v, rest_v = values
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    warps: gl.constexpr = gl.num_warps()
    rows: gl.constexpr = 16 * warps
    score_layout: gl.constexpr = _product_layout(BLOCK_N, warps)
    main_layout: gl.constexpr = _product_layout(MAIN, warps)
    rest_layout: gl.constexpr = _product_layout(REST, warps)
    main_memory: gl.constexpr = _memory_layout(MAIN, warps)
    rest_memory: gl.constexpr = _memory_layout(REST, warps)

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
    if KEEP_QUERIES:
        main_factor = main_q.load(gl.DotOperandLayout(0, score_layout, 2))
        rest_factor = rest_q.load(gl.DotOperandLayout(0, score_layout, 2))
    else:
        main_factor = main_q
        rest_factor = rest_q

    zero = gl.zeros([rows, BLOCK_N], gl.float32, score_layout)
    mbarrier.wait(keys_full.index(0), 0)
    score = warpgroup_mma_wait(0, [_scores(main_factor, rest_factor, keys, 0, zero, REST)])
    mbarrier.arrive(keys_empty.index(0), count=1)
    n = (num_blocks - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
    score = gl.where((n < length)[None, :], score, float("-inf"))
    best = gl.max(score, axis=1) * scale_log2
    weight = gl.exp2(score * scale_log2 - best[:, None])
    total = _own_sum(weight)
    rounded = weight.to(dtype)
    main_acc = gl.zeros([rows, MAIN], gl.float32, main_layout)
    if REST > 0:
        rest_acc = gl.zeros([rows, REST], gl.float32, rest_layout)

    value_stage = 0
    value_phase = 0
    key_stage, key_phase = _next(0, 0, STAGES)
    for _ in range(1, num_blocks):
        mbarrier.wait(keys_full.index(key_stage), key_phase)
        score = _scores(main_factor, rest_factor, keys, key_stage, zero, REST)
        mbarrier.wait(values_full.index(value_stage), value_phase)
        main_p = gl.convert_layout(rounded, gl.DotOperandLayout(0, main_layout, 2))
        main_acc = warpgroup_mma(main_p, main_v.index(value_stage), main_acc, is_async=True)
        if REST > 0:
            rest_p = gl.convert_layout(rounded, gl.DotOperandLayout(0, rest_layout, 2))
            rest_acc = warpgroup_mma(rest_p, rest_v.index(value_stage), rest_acc, is_async=True)
            score = warpgroup_mma_wait(2, [score])
        else:
            score = warpgroup_mma_wait(1, [score])
        mbarrier.arrive(keys_empty.index(key_stage), count=1)

        new_best = gl.maximum(best, gl.max(score, axis=1) * scale_log2)
        weight = gl.exp2(score * scale_log2 - new_best[:, None])
        fade = gl.exp2(best - new_best)
        total = _times_rows(total, fade) + _own_sum(weight)
        best = new_best
        rounded = weight.to(dtype)

        if REST > 0:
            main_acc, rest_acc, main_p, rest_p = warpgroup_mma_wait(0, [main_acc, rest_acc, main_p, rest_p])
            rest_acc = _times_rows(rest_acc, fade)
        else:
            main_acc, main_p = warpgroup_mma_wait(0, [main_acc, main_p])
        main_acc = _times_rows(main_acc, fade)
        mbarrier.arrive(values_empty.index(value_stage), count=1)
        value_stage = key_stage
        value_phase = key_phase
        key_stage, key_phase = _next(key_stage, key_phase, STAGES)

    mbarrier.wait(values_full.index(value_stage), value_phase)
    main_p = gl.convert_layout(rounded, gl.DotOperandLayout(0, main_layout, 2))
    main_acc = warpgroup_mma(main_p, main_v.index(value_stage), main_acc, is_async=True)
    inverse = 1.0 / gl.sum(total, axis=1)
    # The queries' memory takes the output on its way: a thread of the product holds scattered pairs of it.
    if REST > 0:
        rest_p = gl.convert_layout(rounded, gl.DotOperandLayout(0, rest_layout, 2))
        rest_acc = warpgroup_mma(rest_p, rest_v.index(value_stage), rest_acc, is_async=True)
        main_acc, rest_acc, main_p, rest_p = warpgroup_mma_wait(0, [main_acc, rest_acc, main_p, rest_p])
        rest_q.store(_times_rows(rest_acc, inverse).to(dtype))
    else:
        main_acc, main_p = warpgroup_mma_wait(0, [main_acc, main_p])
    main_q.store(_times_rows(main_acc, inverse).to(dtype))
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
    queries = _allocate(dtype, CONSUMERS, ROWS, MAIN, REST)
    keys = _allocate(dtype, STAGES, BLOCK_N, MAIN, REST)
    values = _allocate(dtype, STAGES, BLOCK_N, MAIN, REST)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(keys_empty.index(stage), count=CONSUMERS)
        mbarrier.init(values_empty.index(stage), count=CONSUMERS)
    sources = ((k_ptr, k_stride_t), (v_ptr, v_stride_t))
    task = ((q_ptr, q_stride_t), (out_ptr, out_stride_t), sources, begin, length, num_blocks, scale_log2)
    memory = (queries, keys, values, (keys_full, values_full), (keys_empty, values_empty))
    gl.static_assert(CONSUMERS == 3)  # as many as are listed here
    gl.warp_specialize([
        (_consume, (task, memory, SIZE, MAIN, REST, BLOCK_N, STAGES, KEEP_QUERIES, 0)),
        (_consume, (task, memory, SIZE, MAIN, REST, BLOCK_N, STAGES, KEEP_QUERIES, 1)),
        (_consume, (task, memory, SIZE, MAIN, REST, BLOCK_N, STAGES, KEEP_QUERIES, 2)),
        (_produce, (task, memory, SIZE, MAIN, REST, BLOCK_N, STAGES)),
    ], [4, 4, 1], [_CONSUMER_REGISTERS, _CONSUMER_REGISTERS, _PRODUCER_REGISTERS])  # fmt: skip


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
    _varlen_hopper_kernel[(num_patches // _BLOCK_M + num_rows, num_heads)](
        q_PNH, k_PNH, v_PNH, out_PNH, cu_seqlens_B1, num_rows, scale * _LOG2_E,
        q_PNH.stride(0), q_PNH.stride(1), k_PNH.stride(0), k_PNH.stride(1), v_PNH.stride(0), v_PNH.stride(1),
        num_heads * size, SIZE=size, MAIN=parts[0], REST=parts[1], CONSUMERS=_CONSUMERS,
        BLOCK_N=_BLOCK_N, STAGES=_STAGES, KEEP_QUERIES=size <= _LARGEST_KEPT if keep_queries is None else keep_queries,
        num_warps=_CONSUMER_WARPS, maxnreg=_REGISTERS,
    )  # fmt: skip
    return out_PNH
