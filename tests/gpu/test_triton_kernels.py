"""Every Triton kernel against the plain-torch reference, over shapes and dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Mask(NamedTuple):
    """What an attention may be asked beside its rows; ``visible`` and ``whole`` of ten tokens of each long row."""

    window: int | None = None
    visible: bool = False
    whole: bool = False
    softcap: float | None = None


PLAIN, EVERYTHING = Mask(), Mask(6, visible=True, whole=True, softcap=5.0)
FOR_DECODES = (PLAIN, Mask(24), Mask(24, softcap=5.0))  # no such step has ranges to see
FOR_ALL = (*FOR_DECODES, Mask(visible=True), Mask(6, visible=True), Mask(6, visible=True, whole=True))
# Each combination of heads, height of a block and mask compiles a kernel, which takes a second or more. So the heads of
# Qwen2-VL-2B meet all masks; those of its 7B, of a tower and of Phi-3-vision meet the plain one, which they have, and
# once everything together.
HEADS = [(28, 4, 128, torch.bfloat16), (16, 16, 80, torch.bfloat16), (8, 8, 96, torch.float32)]
ATTENTIONS = [
    *((12, 2, 128, torch.bfloat16, name, FOR_DECODES if name.startswith("decode") else FOR_ALL) for name in ROWS),
    *((*heads, name, (PLAIN, EVERYTHING) if name == "mixed" else (PLAIN,)) for heads in HEADS for name in ROWS),
]


@pytest.mark.parametrize(
    ("heads", "kv", "size", "dtype", "name", "masks"),
    [pytest.param(*case, id="-".join(map(str, case[:-1]))) for case in ATTENTIONS],
)
def test_paged_attention_equals_reference(
    kernels: Any, heads: int, kv: int, size: int, dtype: torch.dtype, name: str, masks: Sequence[Mask]
):
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
    for mask in masks:
        cache = LayerCache(*(rand(num_blocks, page, kv, size, dtype=dtype, seed=s) for s in (3, 4)))
        inputs = AttentionInputs(
            query_start_B1=torch.tensor(starts, dtype=torch.int32, device="cuda"),
            context_lens_B=torch.tensor(context_lens, dtype=torch.int32, device="cuda"),
            block_tables_BL=tables.int().cuda(),
            slot_mapping_T=(tables[owner, positions // page] * page + positions % page).cuda(),
            query_lens=query_lens,
            context_lens=context_lens,
            visible_end_T=visible_end.int().cuda() if mask.visible else None,
            visible_begin_T=visible_begin.int().cuda() if mask.whole else None,
        )
        twin = LayerCache(cache.key.clone(), cache.value.clone())
        kernels.write_kv(k, v, cache, inputs.slot_mapping_T)
        reference.write_kv(k, v, twin, inputs.slot_mapping_T)
        assert torch.equal(cache.key, twin.key)
        assert torch.equal(cache.value, twin.value)
        got = kernels.paged_attention(q, k, v, cache, inputs, size**-0.5, mask.window, mask.softcap)
        assert_close(got, reference.paged_attention(q, k, v, twin, inputs, size**-0.5, mask.window, mask.softcap))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 1152), (300, 1280)])
def test_layer_norm_equals_reference(kernels: Any, dtype: torch.dtype, rows: int, width: int):
    x, residual = rand(rows, width, dtype=dtype), rand(rows, width, dtype=dtype, seed=3)
    weight, bias = rand(width, dtype=dtype, seed=1), rand(width, dtype=dtype, seed=2)
    for given in (None, residual):
        for got, expected in zip(
            kernels.layer_norm(x, weight, bias, 1e-6, given),
            reference.layer_norm(x, weight, bias, 1e-6, given),
            strict=True,
        ):
            assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu", "quick_gelu", "relu"])
def test_activation_equals_reference(kernels: Any, dtype: torch.dtype, name: str):
    x = rand(33, 5121, dtype=dtype)
    assert_close(kernels.activation(x, name), reference.activation(x, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv", "size", "pairs"), [(4, 2, 16, 8), (12, 2, 128, 64), (5, 5, 80, 20)])
def test_rope_and_write_equals_reference(kernels: Any, dtype: torch.dtype, heads: int, kv: int, size: int, pairs: int):
    fused = rand(9, heads + 2 * kv, size, dtype=dtype)
    q, k, v = fused.split((heads, kv, kv), dim=1)
    angle = rand(9, pairs, seed=2)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:9].cuda()
    caches = [LayerCache(*(torch.zeros(10, 4, kv, size, dtype=dtype, device="cuda") for _ in "kv")) for _ in range(2)]
    for got, expected in zip(
        kernels.rope_and_write(q, k, v, angle.cos(), angle.sin(), caches[0], slots),
        reference.rope_and_write(q, k, v, angle.cos(), angle.sin(), caches[1], slots),
        strict=True,
    ):
        assert_close(got, expected)
    for got, expected in zip(*caches, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_equals_reference_and_takes_the_first_of_equals(kernels: Any, dtype: torch.dtype):
    logits = rand(6, 151936, dtype=dtype)
    logits[1, 7] = logits[1, 900] = logits[1, 150000] = 9.0
    logits[2, 5], logits[3, 8], logits[4] = float("nan"), float("inf"), float("-inf")
    ids, finite = kernels.greedy(logits)
    expected_ids, expected_finite = reference.greedy(logits)
    assert torch.equal(finite, expected_finite)
    assert torch.equal(ids[finite], expected_ids[finite])
    assert ids[1] == 7
    assert ((ids >= 0) & (ids < 151936)).all()


@pytest.mark.parametrize("size", [64, 72, 80, 88, 96, 128])
@pytest.mark.parametrize("lens", [(1,), (150, 64, 3, 129), (577, 577)], ids=str)
def test_varlen_attention_equals_reference(kernels: Any, size: int, lens: tuple[int, ...]):
    heads, num_patches = 3, sum(lens)
    ends = torch.tensor((0, *lens)).cumsum(0, dtype=torch.int32).cuda()
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = rand(num_patches, 3 * heads, size, dtype=dtype).split(heads, dim=1)
        expected = reference.varlen_attention(q.float(), k.float(), v.float(), ends, lens, size**-0.5)
        assert_close(kernels.varlen_attention(q, k, v, ends, lens, size**-0.5), expected.to(dtype))


def test_varlen_attention_reads_nothing_of_the_neighbours(kernels: Any):
    q, k, v = rand(300, 6, 80, dtype=torch.bfloat16).split(2, dim=1)
    lens, ends = (100, 90, 110), torch.tensor((0, 100, 190, 300), dtype=torch.int32, device="cuda")
    alone = kernels.varlen_attention(q, k, v, ends, lens, 0.1)
    for x in (q, k, v):
        x[:100], x[190:] = float("nan"), float("inf")
    assert torch.equal(kernels.varlen_attention(q, k, v, ends, lens, 0.1)[100:190], alone[100:190])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 50), (1536, 2048), (8960, 1536), (1280, 3)])
def test_linear_equals_reference(kernels: Any, dtype: torch.dtype, rows: int, num_in: int, num_out: int):
    x, weight = rand(rows, num_in, dtype=dtype), rand(num_out, num_in, seed=1).mul_(num_in**-0.5).to(dtype)
    for bias in (None, rand(num_out, dtype=dtype, seed=2)):
        expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_close(kernels.linear(x, weight, bias), expected.to(dtype))
