"""The CPU's own kernels against the reference, at the sizes where they part from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsin.kernels import packed, packed_attention, reference
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.quantized import FP8, narrowed

HEAD_DIM, BLOCK = 16, 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _step(lens: list[tuple[int, int]], num_kv_heads: int, dtype: torch.dtype) -> tuple[LayerCache, AttentionInputs]:
    """A step of rows (query_len, context_len), with a cache of anything in blocks of any order."""
    counts = [-(-context // BLOCK) for _, context in lens]
    blocks = (torch.randperm(sum(counts)) + 1).int()
    tables_BL = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for table_L, own in zip(tables_BL, blocks.split(counts), strict=True):
        table_L[: len(own)] = own
    shape = (sum(counts) + 1, BLOCK, num_kv_heads, HEAD_DIM)
    cache = LayerCache(*(torch.randn(shape).to(dtype) for _ in range(2)))
    places = [torch.arange(context - query, context) for query, context in lens]
    slots = [row_L[at // BLOCK] * BLOCK + at % BLOCK for row_L, at in zip(tables_BL, places, strict=True)]
    inputs = AttentionInputs(
        query_start_B1=torch.tensor([0, *(query for query, _ in lens)]).cumsum(0).int(),
        context_lens_B=torch.tensor([context for _, context in lens], dtype=torch.int32),
        block_tables_BL=tables_BL,
        slot_mapping_T=torch.cat(slots).long(),
        query_lens=tuple(query for query, _ in lens),
        context_lens=tuple(context for _, context in lens),
    )
    return cache, inputs


@DTYPES
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("num_heads", [2, 6], ids=["one-query-per-key", "three-queries-per-key"])
@pytest.mark.parametrize(
    "lens",
    [
        [(1, 33)],
        [(1, 5), (1, 64), (1, 17)],
        [(1, 64), (1, 64)],
        [(600, 600)],
        [(200, 300), (1, 7), (192, 192), (9, 9)],
        [(1, 90), (1, 30), (16, 80), (8, 8), (1, 50), (5, 90)],
    ],
    ids=str,
)
def test_paged_attention_equals_reference(lens, num_heads, window, softcap, dtype):
    torch.manual_seed(0)
    cache, inputs = _step(lens, 2, dtype)
    q_TNH = torch.randn(len(inputs.slot_mapping_T), num_heads, HEAD_DIM).to(dtype)
    k_TKH, v_TKH = (stored.flatten(0, 1)[inputs.slot_mapping_T] for stored in cache)
    arguments = (q_TNH, k_TKH, v_TKH, cache, inputs, HEAD_DIM**-0.5, window, softcap)
    expected = reference.paged_attention(*arguments)
    torch.testing.assert_close(packed.KERNELS.paged_attention(*arguments), expected, atol=TOLERANCE[dtype], rtol=0)


@DTYPES
@pytest.mark.parametrize("lens", [[(1, 5), (1, 64), (1, 17)], [(200, 300), (1, 7), (192, 192), (9, 9)]], ids=str)
def test_a_cache_of_8_bits_gives_what_its_rounded_numbers_give(lens, dtype):
    torch.manual_seed(0)
    cache, inputs = _step(lens, 2, dtype)
    narrow = LayerCache(*(narrowed(stored, FP8) for stored in cache))
    wide = LayerCache(*(stored.to(dtype) for stored in narrow))
    q_TNH = torch.randn(len(inputs.slot_mapping_T), 6, HEAD_DIM).to(dtype)
    k_TKH, v_TKH = (torch.randn(len(q_TNH), 2, HEAD_DIM).to(dtype) * 300 for _ in "kv")  # some are beyond e4m3
    for kernels in (reference.KERNELS, packed.KERNELS):
        outputs: list[torch.Tensor] = []
        for stored, k, v in (
            (narrow, k_TKH, v_TKH),
            (wide, *(narrowed(new_TKH, FP8).to(dtype) for new_TKH in (k_TKH, v_TKH))),
        ):
            kernels.write_kv(k, v, stored, inputs.slot_mapping_T)
            outputs.append(kernels.paged_attention(q_TNH, k, v, stored, inputs, HEAD_DIM**-0.5))
        assert all(torch.equal(a.to(dtype), b) for a, b in zip(narrow, wide, strict=True))
        assert torch.equal(*outputs)


class NoIndexedFloats(TorchDispatchMode):
    """Refuses to index 8-bit floats, as torch does on some devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert "index" not in str(func) or all(tensor.dtype != FP8 for tensor in tensors), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lens", [[(1, 5), (1, 64)], [(200, 300), (9, 9)]], ids=str)
def test_a_cache_of_8_bits_is_indexed_as_bytes(lens):
    cache, inputs = _step(lens, 2, torch.float32)
    narrow = LayerCache(*(narrowed(stored, FP8) for stored in cache))
    q_TNH, k_TKH = (torch.zeros(len(inputs.slot_mapping_T), heads, HEAD_DIM) for heads in (6, 2))
    for kernels in (reference.KERNELS, packed.KERNELS):
        with NoIndexedFloats():
            kernels.write_kv(k_TKH, k_TKH, narrow, inputs.slot_mapping_T)
            kernels.paged_attention(q_TNH, k_TKH, k_TKH, narrow, inputs, 1.0)


@DTYPES
def test_paged_attention_sees_nothing_of_what_lies_behind_a_shorter_row_s_context(dtype):
    # A block's former tenant may have left what is not a number; it would reach everybody who multiplies it, by 0 too.
    torch.manual_seed(0)
    lens = [(1, 5), (1, 64), (1, 17), (3, 20)]
    cache, inputs = _step(lens, 2, dtype)
    seen = torch.zeros(cache.key.shape[:2], dtype=torch.bool).flatten()
    for row_L, (_, context) in zip(inputs.block_tables_BL, lens, strict=True):
        at = torch.arange(context)
        seen[row_L[at // BLOCK] * BLOCK + at % BLOCK] = True
    for stored in cache:
        stored.flatten(0, 1)[~seen] = torch.nan
    q_TNH, kv_TKH = torch.randn(6, 2, HEAD_DIM).to(dtype), torch.empty(6, 2, HEAD_DIM)
    arguments = (q_TNH, kv_TKH, kv_TKH, cache, inputs, 0.25)
    expected = reference.paged_attention(*arguments)
    torch.testing.assert_close(packed.KERNELS.paged_attention(*arguments), expected, atol=TOLERANCE[dtype], rtol=0)


@DTYPES
@pytest.mark.parametrize("window", [None, 20])
def test_paged_attention_of_tokens_that_see_one_another_equals_reference(window, dtype):
    torch.manual_seed(0)
    lens = [(1, 33), (24, 40), (1, 9), (200, 230)]
    cache, inputs = _step(lens, 2, dtype)
    index_T = torch.cat([torch.arange(context - query, context) for query, context in lens]).int()
    begin_T, end_T = index_T.clone(), index_T + 1
    for first, last, span in ((4, 14, (19, 29)), (30, 90, (34, 94))):  # tokens of the step, positions of their row
        begin_T[first:last], end_T[first:last] = span
    inputs = dataclasses.replace(inputs, visible_begin_T=begin_T, visible_end_T=end_T)
    q_TNH = torch.randn(len(index_T), 6, HEAD_DIM).to(dtype)
    k_TKH, v_TKH = (stored.flatten(0, 1)[inputs.slot_mapping_T] for stored in cache)
    arguments = (q_TNH, k_TKH, v_TKH, cache, inputs, 0.25, window)
    expected = reference.paged_attention(*arguments)
    torch.testing.assert_close(packed.KERNELS.paged_attention(*arguments), expected, atol=TOLERANCE[dtype], rtol=0)


def test_layers_of_a_step_see_each_by_its_own_window_and_heads():
    torch.manual_seed(0)
    lens = [(1, 90), (1, 30), (16, 80)]
    inputs = _step(lens, 2, torch.float32)[1]
    for num_heads, num_kv_heads, window in ((6, 2, None), (6, 2, 40), (2, 2, None), (8, 1, 40), (6, 2, None)):
        cache = LayerCache(*(torch.randn(16, BLOCK, num_kv_heads, HEAD_DIM) for _ in "kv"))
        q_TNH = torch.randn(18, num_heads, HEAD_DIM)
        k_TKH, v_TKH = (stored.flatten(0, 1)[inputs.slot_mapping_T] for stored in cache)
        arguments = (q_TNH, k_TKH, v_TKH, cache, inputs, 0.25, window)
        expected = reference.paged_attention(*arguments)
        torch.testing.assert_close(packed.KERNELS.paged_attention(*arguments), expected, atol=1e-5, rtol=0)


@DTYPES
@pytest.mark.parametrize("seq_lens", [(200,), (192, 192, 700), (200, 30)], ids=str)
def test_varlen_attention_equals_reference(seq_lens, dtype):
    torch.manual_seed(0)
    qkv = torch.randn(sum(seq_lens), 3 * 2 * HEAD_DIM).to(dtype)
    q_PNH, k_PNH, v_PNH = (part.unflatten(-1, (2, HEAD_DIM)) for part in qkv.chunk(3, dim=-1))
    ends = torch.tensor([0, *seq_lens]).cumsum(0).int()
    expected = reference.varlen_attention(q_PNH, k_PNH, v_PNH, ends, seq_lens, 0.25)
    for known in (seq_lens, None):
        actual = packed.KERNELS.varlen_attention(q_PNH, k_PNH, v_PNH, ends, known, 0.25)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=0)


def test_decode_with_much_to_gather_equals_reference(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(packed_attention, "_ONE_CALL_VALUES", 0)
    cache, inputs = _step([(1, 33), (1, 48)], 2, torch.float32)
    q_TNH = torch.randn(2, 4, HEAD_DIM)
    k_TKH, v_TKH = (stored.flatten(0, 1)[inputs.slot_mapping_T] for stored in cache)
    arguments = (q_TNH, k_TKH, v_TKH, cache, inputs, 0.25)
    torch.testing.assert_close(packed.KERNELS.paged_attention(*arguments), reference.paged_attention(*arguments))


@DTYPES
@pytest.mark.parametrize("num_pairs", [HEAD_DIM // 2, HEAD_DIM // 4], ids=["whole-head", "half-head"])
def test_rope_and_write_equals_reference(num_pairs, dtype):
    torch.manual_seed(0)
    cache, inputs = _step([(3, 20), (1, 1)], 2, dtype)
    expected_cache = LayerCache(*(stored.clone() for stored in cache))
    q_TNH, k_TKH, v_TKH = (torch.randn(4, heads, HEAD_DIM).to(dtype) for heads in (6, 2, 2))
    angles_TR = torch.randn(4, num_pairs)
    arguments = (q_TNH, k_TKH, v_TKH, angles_TR.cos(), angles_TR.sin())
    actual = packed.KERNELS.rope_and_write(*arguments, cache, inputs.slot_mapping_T)
    expected = reference.rope_and_write(*arguments, expected_cache, inputs.slot_mapping_T)
    torch.testing.assert_close((*actual, *cache), (*expected, *expected_cache), atol=TOLERANCE[dtype], rtol=0)
