"""Attention of prompts over the paged cache on Hopper, with the schedule of ``hopper``.

A tile is one key head and 192 query rows of one request; query heads that share the key head are rows of the same tile,
as in ``attention``. The copy engine brings keys and values page by page, several to a block of 64.

Programs go from tile to tile, as many as there are multiprocessors: what is found out once about the step's rows then
serves all tiles of a program, and a step padded with empty rows costs no empty programs, each of which would have had
a multiprocessor to itself.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.triton.device import num_multiprocessors
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

_MAIN = 64  # columns of the first part of a head
_SIZES = (64, 80, 96, 128)
_PAGES = (16, 32, 64)
_MAX_ROWS = 512  # of a step, unless there are more


def suits(q_TNH: torch.Tensor, cache: LayerCache) -> bool:
    """16 bits, heads of one or two parts, and pages that make up blocks."""
    _, num_heads, size = q_TNH.shape
    page, num_kv = cache.key.shape[1:3]
    fits = size in _SIZES and page in _PAGES and num_heads // num_kv <= 16
    return fits and q_TNH.dtype == cache.key.dtype and q_TNH.dtype.itemsize == 2


@gluon.jit
def _tile(work, tile, NUM_KV: gl.constexpr, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr):
    """A tile's row and key head; its first flat token, and their number; how many keys its row has, how many stand
    before the tile's first query, and how many blocks of them it sees: 0 where there is no such tile."""
    start_ptr, context_ptr, first_row, end_row, _, end_slot = work
    head = tile % NUM_KV
    slot = end_slot - 1 - tile // NUM_KV  # from the last: of a prompt, its end has the most keys to see
    # Row r owns slots from start[r] // BLOCK_Q + r on: at least one each, and enough for its queries.
    low = first_row
    high = end_row
    while low < high:
        middle = (low + high) // 2
        if gl.load(start_ptr + middle) // BLOCK_Q + middle <= slot:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    first = gl.load(start_ptr + row)
    query_len = gl.load(start_ptr + row + 1) - first
    context = gl.load(context_ptr + row)
    begin = (slot - (first // BLOCK_Q + row)) * BLOCK_Q
    seen = context - query_len + begin  # keys before the tile's first query
    num_blocks = gl.cdiv(gl.minimum(context, seen + BLOCK_Q), BLOCK_N)
    if begin >= query_len:
        num_blocks = 0
    queries = (first + begin, gl.minimum(query_len - begin, BLOCK_Q))
    return (row, head), queries, (context, seen, num_blocks)


@gluon.jit
def _fetch(
    descriptors, rows, column, bar, buffers, stage, MAIN: gl.constexpr, REST: gl.constexpr, PIECES: gl.constexpr
):
    """Ask for a block of keys or values, ``rows`` being where in the cache its pieces begin."""
    main, rest = descriptors
    main_to, rest_to = buffers
    if REST > 0:
        mbarrier.expect(bar, (main.block_type.nbytes + rest.block_type.nbytes) * PIECES)
    else:
        mbarrier.expect(bar, main.block_type.nbytes * PIECES)
    for piece in gl.static_range(PIECES):
        at = stage * PIECES + piece
        tma.async_copy_global_to_shared(main, [rows[piece], column], bar, main_to.index(at))
        if REST > 0:
            tma.async_copy_global_to_shared(rest, [rows[piece], column + MAIN], bar, rest_to.index(at))


@gluon.jit
def _pieces(block, PIECES: gl.constexpr, PAGE: gl.constexpr):
    """Shared memory of blocks as that of their pages."""
    dtype: gl.constexpr = block.dtype
    count: gl.constexpr = block.shape[0] * PIECES
    width: gl.constexpr = block.shape[2]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, width], dtype)
    return block._reinterpret(dtype, [count, PAGE, width], layout)


@gluon.jit
def _produce(
    task, memory, of_keys, of_values,
    NUM_KV: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
    MAIN: gl.constexpr, REST: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    work, table, _, _ = task
    _, keys, values, full, empty = memory
    table_ptr, table_stride = table
    keys_full, values_full = full
    keys_empty, values_empty = empty
    PIECES: gl.constexpr = BLOCK_N // PAGE
    key_pieces = (_pieces(keys[0], PIECES, PAGE), _pieces(keys[1], PIECES, PAGE))
    value_pieces = (_pieces(values[0], PIECES, PAGE), _pieces(values[1], PIECES, PAGE))
    stage = 0
    phase = 1  # a wait for the phase before the first one ends at once
    for tile in range(gl.program_id(0), work[4], gl.num_programs(0)):
        place, _tokens, keys_seen = _tile(work, tile, NUM_KV, GROUP, BLOCK_Q, BLOCK_N)
        row, head = place
        context = keys_seen[0]
        num_blocks = keys_seen[2]
        pages_ptr = table_ptr + row.to(gl.int64) * table_stride
        last_page = (context - 1) // PAGE  # stands in for those past it
        for block in range(num_blocks):
            column = (num_blocks - 1 - block) * PIECES
            rows = ()
            for piece in gl.static_range(PIECES):
                rows = rows + (gl.load(pages_ptr + gl.minimum(column + piece, last_page)) * PAGE,)  # noqa: RUF005
            mbarrier.wait(keys_empty.index(stage), phase)
            _fetch(of_keys, rows, head * SIZE, keys_full.index(stage), key_pieces, stage, MAIN, REST, PIECES)
            mbarrier.wait(values_empty.index(stage), phase)
            _fetch(of_values, rows, head * SIZE, values_full.index(stage), value_pieces, stage, MAIN, REST, PIECES)
            stage, phase = following(stage, phase, STAGES)


@gluon.jit
def _consume(
    task, memory,
    NUM_KV: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr, BLOCK_Q: gl.constexpr,
    MAIN: gl.constexpr, REST: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    work, _, source, target = task
    q_ptr, q_stride_t, q_stride_h = source
    out_ptr, scale_log2 = target
    queries, keys, values, full, empty = memory
    main_q = queries[0].index(INDEX)
    rest_q = queries[1].index(INDEX)
    warps: gl.constexpr = gl.num_warps()
    rows: gl.constexpr = 16 * warps
    main_layout: gl.constexpr = memory_layout(MAIN, warps)
    rest_layout: gl.constexpr = memory_layout(REST, warps)
    score_layout: gl.constexpr = product_layout(BLOCK_N, warps)
    main_m = INDEX * rows + gl.arange(0, rows, gl.SliceLayout(1, main_layout))
    main_h = gl.arange(0, MAIN, gl.SliceLayout(0, main_layout))[None, :]
    main_q_at = ((main_m // GROUP) * q_stride_t + (main_m % GROUP) * q_stride_h)[:, None] + main_h
    main_out_at = ((main_m // GROUP) * (NUM_KV * GROUP * SIZE) + (main_m % GROUP) * SIZE)[:, None] + main_h
    if REST > 0:
        rest_m = INDEX * rows + gl.arange(0, rows, gl.SliceLayout(1, rest_layout))
        rest_h = gl.arange(0, REST, gl.SliceLayout(0, rest_layout))[None, :]
        rest_q_at = ((rest_m // GROUP) * q_stride_t + (rest_m % GROUP) * q_stride_h)[:, None] + rest_h
        rest_out_at = ((rest_m // GROUP) * (NUM_KV * GROUP * SIZE) + (rest_m % GROUP) * SIZE)[:, None] + rest_h
    score_m = INDEX * rows + gl.arange(0, rows, gl.SliceLayout(1, score_layout))
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), work[4], gl.num_programs(0)):
        place, tokens, keys_seen = _tile(work, tile, NUM_KV, GROUP, BLOCK_Q, BLOCK_N)
        head = place[1]
        first, num_tokens = tokens
        context, seen, num_blocks = keys_seen
        if num_blocks > 0:
            flat = first.to(gl.int64)
            q_here = q_ptr + flat * q_stride_t + head * GROUP * q_stride_h
            num_queries = num_tokens * GROUP  # they are the first rows
            main_q.store(gl.load(q_here + main_q_at, mask=(main_m < num_queries)[:, None], other=0.0))
            if REST > 0:
                rest_q.store(gl.load(q_here + rest_q_at + MAIN, mask=(rest_m < num_queries)[:, None], other=0.0))
            fence_async_shared()
            visible = gl.minimum(seen + score_m // GROUP + 1, context)
            num_masked = num_blocks - (seen + 1) // BLOCK_N
            stage, phase = attend(
                (main_q, rest_q), (keys, values, full, empty), (stage, phase),
                (num_blocks, num_masked, context - (num_blocks - 1) * BLOCK_N), visible, scale_log2,
                MAIN, REST, BLOCK_N, STAGES, False, True,
            )  # fmt: skip
            out_here = out_ptr + (flat * NUM_KV + head) * (GROUP * SIZE)
            gl.store(out_here + main_out_at, main_q.load(main_layout), mask=(main_m < num_queries)[:, None])
            if REST > 0:
                gl.store(out_here + rest_out_at + MAIN, rest_q.load(rest_layout), mask=(rest_m < num_queries)[:, None])


# Numbers that change from step to step are not specialised: else Triton compiles a kernel for each of their kinds.
@gluon.jit(do_not_specialize=["skips_singles", "num_rows", "table_stride"])
def _paged_hopper_kernel(
    q_ptr, main_keys, rest_keys, main_values, rest_values, out_ptr, table_ptr, start_ptr, context_ptr,
    skips_singles, num_rows, table_stride, q_stride_t, q_stride_h, scale_log2,
    NUM_KV: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr, PAGE: gl.constexpr, MAX_ROWS: gl.constexpr,
    MAIN: gl.constexpr, REST: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * WARPS
    BLOCK_Q: gl.constexpr = ROWS * CONSUMERS // GROUP
    # Rows without a context pad the step, and stand at its end; rows of one token each may stand at its beginning.
    r = gl.arange(0, MAX_ROWS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    is_real = gl.load(context_ptr + r, mask=r < num_rows, other=0) > 0
    end_row = gl.sum(is_real.to(gl.int32), axis=0)
    is_single = is_real & (gl.load(start_ptr + r + 1, mask=r < num_rows, other=0) == r + 1)
    first_row = gl.sum(is_single.to(gl.int32), axis=0) * skips_singles
    end_slot = gl.load(start_ptr + end_row) // BLOCK_Q + end_row
    num_tiles = (end_slot - (gl.load(start_ptr + first_row) // BLOCK_Q + first_row)) * NUM_KV

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    memory = (
        allocate(dtype, CONSUMERS, ROWS, MAIN, REST),
        allocate(dtype, STAGES, BLOCK_N, MAIN, REST),
        allocate(dtype, STAGES, BLOCK_N, MAIN, REST),
        allocate_barriers(STAGES, 1),
        allocate_barriers(STAGES, CONSUMERS),
    )
    task = (
        (start_ptr, context_ptr, first_row, end_row, num_tiles, end_slot),
        (table_ptr, table_stride),
        (q_ptr, q_stride_t, q_stride_h),
        (out_ptr, scale_log2),
    )
    gl.static_assert(CONSUMERS == 3)  # as many as are listed here
    gl.warp_specialize([
        (_consume, (task, memory, NUM_KV, GROUP, SIZE, BLOCK_Q, MAIN, REST, BLOCK_N, STAGES, 0)),
        (_consume, (task, memory, NUM_KV, GROUP, SIZE, BLOCK_Q, MAIN, REST, BLOCK_N, STAGES, 1)),
        (_consume, (task, memory, NUM_KV, GROUP, SIZE, BLOCK_Q, MAIN, REST, BLOCK_N, STAGES, 2)),
        (_produce, (task, memory, (main_keys, rest_keys), (main_values, rest_values),
                    NUM_KV, GROUP, SIZE, PAGE, BLOCK_Q, MAIN, REST, BLOCK_N, STAGES)),
    ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def launch(
    q_TNH: torch.Tensor,
    out_TNH: torch.Tensor,
    cache: LayerCache,
    inputs: AttentionInputs,
    scale: float,
    *,
    skips_singles: bool,
) -> None:
    """Causal ``paged_attention`` of what ``suits``, into ``out_TNH``; rows without a context are left as they are.

    Args:
        skips_singles: rows at the beginning that have one token each are left out, too.
    """
    num_tokens, num_heads, size = q_TNH.shape
    _, page, num_kv, _ = cache.key.shape
    group = num_heads // num_kv
    num_rows = len(inputs.query_lens)
    most_tiles = (num_tokens // (BLOCK_M // group) + num_rows) * num_kv
    _paged_hopper_kernel[(min(most_tiles, num_multiprocessors(q_TNH.device)),)](
        q_TNH, *_described(cache.key), *_described(cache.value), out_TNH,
        inputs.block_tables_BL, inputs.query_start_B1, inputs.context_lens_B,
        int(skips_singles), num_rows, inputs.block_tables_BL.stride(0), q_TNH.stride(0), q_TNH.stride(1),
        scale * LOG2_E,
        NUM_KV=num_kv, GROUP=group, SIZE=size, PAGE=page, MAX_ROWS=max(_MAX_ROWS, triton.next_power_of_2(num_rows)),
        MAIN=_MAIN, REST=size - _MAIN, CONSUMERS=CONSUMERS, BLOCK_N=BLOCK_N, STAGES=STAGES,
        num_warps=CONSUMER_WARPS, maxnreg=REGISTERS,
    )  # fmt: skip


def _described(cache: torch.Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """A layer's keys or values as rows of all heads, for copies of a page's two parts of a head."""
    num_blocks, page, num_kv, size = cache.shape
    dtype = gl.bfloat16 if cache.dtype == torch.bfloat16 else gl.float16
    width = num_kv * size

    def part(columns: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([page, columns], dtype)
        return TensorDescriptor(cache, [num_blocks * page, width], [width, 1], [page, columns], layout)

    return part(_MAIN), part(size - _MAIN or _MAIN)
