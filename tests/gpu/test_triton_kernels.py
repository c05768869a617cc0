"""Every Triton kernel against the plain-torch reference, over shapes and dtypes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from opsin.kernels import reference, select
from opsin.kernels.inputs import AttentionInputs, LayerCache

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernels() -> Any:
    return select(torch.device("cuda"), "triton")


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 896), (300, 1536), (3, 5120)])
def test_rms_norm_equals_reference(kernels: Any, dtype: torch.dtype, rows: int, width: int):
    x, weight, residual = (
        rand(rows, width, dtype=dtype),
        rand(width, dtype=dtype, seed=1),
        rand(rows, width, dtype=dtype),
    )
    for given in (None, residual):
        for got, expected in zip(
            kernels.rms_norm(x, weight, 1e-6, given), reference.rms_norm(x, weight, 1e-6, given), strict=True
        ):
            assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 100), (33, 8960)])
def test_gated_activation_equals_reference(kernels: Any, dtype: torch.dtype, name: str, rows: int, width: int):
    x = rand(rows, 2 * width, dtype=dtype)
    assert_close(kernels.gated_activation(x, name), reference.gated_activation(x.clone(), name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv", "size", "pairs"), [(4, 2, 16, 8), (12, 2, 128, 64), (32, 32, 96, 48), (5, 5, 80, 20)]
)
def test_apply_rope_equals_reference(kernels: Any, dtype: torch.dtype, heads: int, kv: int, size: int, pairs: int):
    fused = rand(9, (heads + 2 * kv) * size, dtype=dtype)
    q = fused[:, : heads * size].unflatten(-1, (heads, size))
    k = fused[:, heads * size : (heads + kv) * size].unflatten(-1, (kv, size))
    angle = rand(9, pairs, seed=2)
    for got, expected in zip(
        kernels.apply_rope(q, k, angle.cos(), angle.sin()),
        reference.apply_rope(q, k, angle.cos(), angle.sin()),
        strict=True,
    ):
        assert_close(got, expected)


ROWS = {  # (query length, context length) per row
    "decode": [(1, 1), (1, 700), (1, 16), (1, 33)],
    "decode-one-long": [(1, 5000)],
    "decode-many": [(1, 40 + 3 * i) for i in range(200)],
    "prefill": [(37, 37), (1, 1), (200, 200)],
    "chunk": [(20, 90), (64, 700)],
    "mixed": [(1, 300), (1, 17), (100, 100), (30, 260), (1, 64)],
}
# Few combinations, since each compiles several kernels: those of Qwen2-VL 2B and 7B, of a tower's and of Phi-3's heads.
HEADS = [
    (12, 2, 128, torch.bfloat16),
    (28, 4, 128, torch.bfloat16),
    (16, 16, 80, torch.bfloat16),
    (8, 8, 96, torch.float32),
]


@pytest.mark.parametrize(("heads", "kv", "size", "dtype"), HEADS, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_paged_attention_equals_reference(kernels: Any, dtype: torch.dtype, heads: int, kv: int, size: int, name: str):
    rows, page = ROWS[name], 16
    query_lens = tuple(q for q, _ in rows)
    context_lens = tuple(c for _, c in rows)
    columns = -(-max(context_lens) // page)
    num_blocks = len(rows) * columns + 1
    tables = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1)) + 1).view(len(rows), columns)
    starts = list(itertools.accumulate(query_lens, initial=0))
    positions = torch.cat([torch.arange(c - q, c) for q, c in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(query_lens))
    num_tokens = starts[-1]
    q = rand(num_tokens, heads, size, dtype=dtype)
    k, v = rand(num_tokens, kv, size, dtype=dtype, seed=1), rand(num_tokens, kv, size, dtype=dtype, seed=2)
    visible_end, visible_begin = positions + 1, positions.clone()
    for row, (query_len, context_len) in enumerate(rows):
        if query_len > 30:  # ten tokens that see one another
            first = context_len - query_len + 5
            at = starts[row] + 5
            visible_end[at : at + 10] = first + 10
            visible_begin[at : at + 10] = first
    cases = (
        *((None, None, None, None), (24, None, None, None), (None, visible_end, None, None)),
        *((6, visible_end, None, None), (6, visible_end, visible_begin, None), (24, None, None, 5.0)),
    )
    for window, visible, begin, softcap in cases:
        cache = LayerCache(*(rand(num_blocks, page, kv, size, dtype=dtype, seed=s) for s in (3, 4)))
        inputs = AttentionInputs(
            query_start_B1=torch.tensor(starts, dtype=torch.int32, device="cuda"),
            context_lens_B=torch.tensor(context_lens, dtype=torch.int32, device="cuda"),
            block_tables_BL=tables.int().cuda(),
            slot_mapping_T=(tables[owner, positions // page] * page + positions % page).cuda(),
            query_lens=query_lens,
            context_lens=context_lens,
            visible_end_T=None if visible is None else visible.int().cuda(),
            visible_begin_T=None if begin is None else begin.int().cuda(),
        )
        twin = LayerCache(cache.key.clone(), cache.value.clone())
        kernels.write_kv(k, v, cache, inputs.slot_mapping_T)
        reference.write_kv(k, v, twin, inputs.slot_mapping_T)
        assert torch.equal(cache.key, twin.key)
        assert torch.equal(cache.value, twin.value)
        got = kernels.paged_attention(q, k, v, cache, inputs, size**-0.5, window, softcap)
        assert_close(got, reference.paged_attention(q, k, v, twin, inputs, size**-0.5, window, softcap))
