"""Attention on Hopper (sm_90) for a group of four warps: softmax runs while the tensor cores multiply.

The schedule is FlashAttention-3's, arXiv:2407.08608, sections 3.1 and 3.2, in Gluon, Triton's language of explicit
layouts, barriers and asynchronous products. A warp of its own, the producer, brings blocks of keys and values through
the bulk tensor copy engine; each consumer, a group of four warps, has 64 queries. A consumer asks for the scores of the
next block of keys and for the products of this block's weights with their values at once, waits for the scores only,
and computes the next weights while the values are multiplied. Blocks are taken from the end to the beginning: only the
first ones taken hold keys that some query does not see, so that no other is masked.

``varlen_hopper`` and ``paged_hopper`` are the kernels around it: which queries, and where keys and values come from.
Heads are taken in two parts of 64 and fewer columns; ``REST`` is 0 where one is enough.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E = 1.4426950408889634
CONSUMERS = 3
CONSUMER_WARPS = 4
BLOCK_M = 16 * CONSUMER_WARPS * CONSUMERS
BLOCK_N, STAGES = 64, 4
REGISTERS = 128  # of a thread at the start, the same for all
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(160), gl.constexpr(32)  # from when each knows what it is


@gluon.constexpr_function
def product_layout(width, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, max(width, 16), 16])


@gluon.constexpr_function
def memory_layout(width, warps):
    width = max(width, 16)
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [warps, 1], [1, 0])


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring, and the phase of its barriers."""
    stage += 1
    wraps = stage == STAGES
    return gl.where(wraps, 0, stage), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def allocate(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr):
    """Shared memory for ``COUNT`` times ``ROWS`` rows of a head, in two parts."""
    main_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, MAIN], dtype)
    main = gl.allocate_shared_memory(dtype, [COUNT, ROWS, MAIN], main_layout)
    if REST > 0:
        rest_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, REST], dtype)
        return main, gl.allocate_shared_memory(dtype, [COUNT, ROWS, REST], rest_layout)
    else:
        return main, main


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """For keys and for values, one of each stage."""
    keys = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    values = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(COUNT):
        mbarrier.init(keys.index(stage), count=ARRIVALS)
        mbarrier.init(values.index(stage), count=ARRIVALS)
    return keys, values


@gluon.jit
def _scores(queries, keys, stage, zero, REST: gl.constexpr):
    main_q, rest_q = queries
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
def _masked(score, block, visible, BLOCK_N: gl.constexpr):
    """-inf for the keys that a query does not see; ``block`` counts from the first key."""
    n = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, score.type.layout))
    return gl.where(n[None, :] < visible[:, None], score, float("-inf"))


@gluon.jit
def _reference(best):
    """What weights are relative to: 0 for a query that has seen nothing yet, so that no -inf - -inf arises."""
    return gl.where(best == float("-inf"), 0.0, best)


@gluon.jit
def _clean(memory, stage, num_rows, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Zero the rows from ``num_rows`` on. Each consumer does it for itself, and writes what the others write."""
    layout: gl.constexpr = memory_layout(WIDTH, gl.num_warps())
    held = memory.index(stage)
    n = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    held.store(gl.where((n < num_rows)[:, None], held.load(layout), 0.0))


@gluon.jit
def _advance(
    factors, memory, key_ring, value_ring, block, visible, scale_log2, state, zero,
    MAIN: gl.constexpr, REST: gl.constexpr, BLOCK_N: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Ask for a block's scores and for the products of the block before it; weights of the one, sums of the other."""
    keys, values, full, empty = memory
    stage, phase = key_ring
    value_stage, value_phase = value_ring
    keys_full, values_full = full
    keys_empty, values_empty = empty
    main_v, rest_v = values
    best, total, rounded, main_acc, rest_acc = state
    warps: gl.constexpr = gl.num_warps()
    main_layout: gl.constexpr = product_layout(MAIN, warps)
    rest_layout: gl.constexpr = product_layout(REST, warps)
    mbarrier.wait(keys_full.index(stage), phase)
    score = _scores(factors, keys, stage, zero, REST)
    mbarrier.wait(values_full.index(value_stage), value_phase)
    main_p = gl.convert_layout(rounded, gl.DotOperandLayout(0, main_layout, 2))
    main_acc = warpgroup_mma(main_p, main_v.index(value_stage), main_acc, is_async=True)
    if REST > 0:
        rest_p = gl.convert_layout(rounded, gl.DotOperandLayout(0, rest_layout, 2))
        rest_acc = warpgroup_mma(rest_p, rest_v.index(value_stage), rest_acc, is_async=True)
        score = warpgroup_mma_wait(2, [score])
    else:
        score = warpgroup_mma_wait(1, [score])
    mbarrier.arrive(keys_empty.index(stage), count=1)

    if MASKED:
        score = _masked(score, block, visible, BLOCK_N)
        new_best = gl.maximum(best, gl.max(score, axis=1) * scale_log2)
        reference = _reference(new_best)
    else:
        new_best = gl.maximum(best, gl.max(score, axis=1) * scale_log2)
        reference = new_best
    weight = gl.exp2(score * scale_log2 - reference[:, None])
    fade = gl.exp2(best - reference)
    total = _times_rows(total, fade) + _own_sum(weight)
    rounded = weight.to(rounded.dtype)

    # The weights go through the wait, too: else LLVM moves all that makes them behind it.
    if REST > 0:
        main_acc, rest_acc, main_p, rest_p, rounded, fade = warpgroup_mma_wait(
            0, [main_acc, rest_acc, main_p, rest_p, rounded, fade]
        )
        rest_acc = _times_rows(rest_acc, fade)
    else:
        main_acc, main_p, rounded, fade = warpgroup_mma_wait(0, [main_acc, main_p, rounded, fade])
    main_acc = _times_rows(main_acc, fade)
    mbarrier.arrive(values_empty.index(value_stage), count=1)
    return new_best, total, rounded, main_acc, rest_acc


@gluon.jit
def attend(
    queries, memory, ring, blocks, visible, scale_log2,
    MAIN: gl.constexpr, REST: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    KEEP_QUERIES: gl.constexpr, CLEANS: gl.constexpr,
):  # fmt: skip
    """A consumer's pass over some blocks of keys; its queries' memory holds the result at the end.

    Args:
        queries: shared memory, in two parts.
        memory: of keys and of values, in two parts each, and the barriers of both: full, and empty again.
        ring: the stage that the first block comes in, and the phase of its barriers.
        blocks: how many there are, at least 1; how many of them, from the end, hold keys that some query does not see;
            and how many rows of the last one hold keys at all.
        visible: of each query, how many keys it sees, in the score's layout.
        KEEP_QUERIES: in registers, rather than to read them for each block.
        CLEANS: memory of the last block that holds no keys is not known to be zero.

    Returns:
        The ring, for the blocks that come next.
    """
    keys, values, full, empty = memory
    stage, phase = ring
    num_blocks, num_masked, num_last = blocks
    keys_full, values_full = full
    keys_empty, values_empty = empty
    main_queries, rest_queries = queries
    main_v, rest_v = values
    dtype: gl.constexpr = main_queries.dtype
    warps: gl.constexpr = gl.num_warps()
    rows: gl.constexpr = 16 * warps
    score_layout: gl.constexpr = product_layout(BLOCK_N, warps)
    main_layout: gl.constexpr = product_layout(MAIN, warps)
    rest_layout: gl.constexpr = product_layout(REST, warps)
    if KEEP_QUERIES:
        operand: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
        factors = (main_queries.load(operand), rest_queries.load(operand))
    else:
        factors = queries

    zero = gl.zeros([rows, BLOCK_N], gl.float32, score_layout)
    mbarrier.wait(keys_full.index(stage), phase)
    score = warpgroup_mma_wait(0, [_scores(factors, keys, stage, zero, REST)])
    mbarrier.arrive(keys_empty.index(stage), count=1)
    score = _masked(score, num_blocks - 1, visible, BLOCK_N)
    best = gl.max(score, axis=1) * scale_log2
    weight = gl.exp2(score * scale_log2 - _reference(best)[:, None])
    total = _own_sum(weight)
    rounded = weight.to(dtype)
    main_acc = gl.zeros([rows, MAIN], gl.float32, main_layout)
    if REST > 0:
        rest_acc = gl.zeros([rows, REST], gl.float32, rest_layout)
    else:
        rest_acc = 0  # carried along, never read
    if CLEANS:
        if num_last < BLOCK_N:
            mbarrier.wait(values_full.index(stage), phase)
            _clean(main_v, stage, num_last, BLOCK_N, MAIN)
            if REST > 0:
                _clean(rest_v, stage, num_last, BLOCK_N, REST)
            fence_async_shared()

    value_stage = stage
    value_phase = phase
    stage, phase = following(stage, phase, STAGES)
    # Two loops rather than one that asks: the assembler serialises products that are in flight across a branch.
    for block in range(1, num_masked):
        best, total, rounded, main_acc, rest_acc = _advance(
            factors, memory, (stage, phase), (value_stage, value_phase), num_blocks - 1 - block, visible, scale_log2,
            (best, total, rounded, main_acc, rest_acc), zero, MAIN, REST, BLOCK_N, True,
        )  # fmt: skip
        value_stage = stage
        value_phase = phase
        stage, phase = following(stage, phase, STAGES)
    for block in range(gl.maximum(num_masked, 1), num_blocks):
        best, total, rounded, main_acc, rest_acc = _advance(
            factors, memory, (stage, phase), (value_stage, value_phase), num_blocks - 1 - block, visible, scale_log2,
            (best, total, rounded, main_acc, rest_acc), zero, MAIN, REST, BLOCK_N, False,
        )  # fmt: skip
        value_stage = stage
        value_phase = phase
        stage, phase = following(stage, phase, STAGES)

    mbarrier.wait(values_full.index(value_stage), value_phase)
    main_p = gl.convert_layout(rounded, gl.DotOperandLayout(0, main_layout, 2))
    main_acc = warpgroup_mma(main_p, main_v.index(value_stage), main_acc, is_async=True)
    inverse = 1.0 / gl.sum(total, axis=1)
    # The queries' memory takes the output on its way: a thread of the product holds scattered pairs of it.
    if REST > 0:
        rest_p = gl.convert_layout(rounded, gl.DotOperandLayout(0, rest_layout, 2))
        rest_acc = warpgroup_mma(rest_p, rest_v.index(value_stage), rest_acc, is_async=True)
        main_acc, rest_acc, main_p, rest_p = warpgroup_mma_wait(0, [main_acc, rest_acc, main_p, rest_p])
        rest_queries.store(_times_rows(rest_acc, inverse).to(dtype))
    else:
        main_acc, main_p = warpgroup_mma_wait(0, [main_acc, main_p])
    main_queries.store(_times_rows(main_acc, inverse).to(dtype))
    mbarrier.arrive(values_empty.index(value_stage), count=1)
    return stage, phase
