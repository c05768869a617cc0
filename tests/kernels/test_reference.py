"""The reference kernels against the formulas they claim, written out token by token."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from opsin.errors import ConfigError
from opsin.kernels import Kernels, reference, select
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.models.rule import PixelNorm

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 6, 2, 8, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _step(lens: list[tuple[int, int]], visible_end: list[int] | None = None, visible_begin: list[int] | None = None):
    """A step of rows (query_len, context_len) with every row's keys and values, past ones included, in a cache."""
    num_blocks = sum(-(-context // BLOCK) for _, context in lens) + 1
    order = (torch.randperm(num_blocks - 1) + 1).tolist()
    cache = LayerCache(*(torch.randn(num_blocks, BLOCK, KV_HEADS, HEAD_DIM) for _ in range(2)))
    keys, values, tables, slots = [], [], [], []
    for query, context in lens:
        table = [order.pop() for _ in range(-(-context // BLOCK))]
        row_slots = [table[i // BLOCK] * BLOCK + i % BLOCK for i in range(context)]
        keys.append(cache.key.view(-1, KV_HEADS, HEAD_DIM)[row_slots])
        values.append(cache.value.view(-1, KV_HEADS, HEAD_DIM)[row_slots])
        tables.append(table)
        slots += row_slots[context - query :]
    width = max(map(len, tables))
    inputs = AttentionInputs(
        query_start_B1=torch.tensor([0, *(q for q, _ in lens)]).cumsum(0).int(),
        context_lens_B=torch.tensor([c for _, c in lens], dtype=torch.int32),
        block_tables_BL=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
        slot_mapping_T=torch.tensor(slots),
        query_lens=tuple(q for q, _ in lens),
        context_lens=tuple(c for _, c in lens),
        visible_end_T=None if visible_end is None else torch.tensor(visible_end, dtype=torch.int32),
        visible_begin_T=None if visible_begin is None else torch.tensor(visible_begin, dtype=torch.int32),
    )
    return cache, inputs, keys, values


def _expected(q_TNH, inputs: AttentionInputs, keys, values, scale, window, softcap=math.inf):
    """Softmax attention, one token and one head at a time, in float64."""
    out = []
    t = 0
    for b, (query, context) in enumerate(zip(inputs.query_lens, inputs.context_lens, strict=True)):
        for position in range(context - query, context):
            end = position + 1 if inputs.visible_end_T is None else int(inputs.visible_end_T[t])
            begin = 0 if window is None else max(0, position - window + 1)
            if inputs.visible_begin_T is not None:
                begin = min(begin, int(inputs.visible_begin_T[t]))
            heads = []
            for n in range(HEADS):
                k = keys[b][begin:end, n // (HEADS // KV_HEADS)].double()
                v = values[b][begin:end, n // (HEADS // KV_HEADS)].double()
                scores = (k @ q_TNH[t, n].double()) * scale
                capped = scores if softcap == math.inf else softcap * (scores / softcap).tanh()
                heads.append(capped.softmax(0) @ v)
            out.append(torch.stack(heads))
            t += 1
    return torch.stack(out).float()


@pytest.mark.parametrize(
    "lens",
    [[(1, 1)], [(1, 9), (1, 4), (1, 1)], [(7, 7)], [(5, 13)], [(1, 6), (4, 4), (3, 11), (8, 8), (1, 17)]],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_paged_attention_of_mixed_rows_equals_formula(lens, window):
    cache, inputs, keys, values = _step(lens)
    q_TNH = torch.randn(sum(inputs.query_lens), HEADS, HEAD_DIM)
    k_TKH, v_TKH = (torch.cat([x[-q:] for x, (q, _) in zip(xs, lens, strict=True)]) for xs in (keys, values))
    out = reference.paged_attention(q_TNH, k_TKH, v_TKH, cache, inputs, 0.3, window)
    torch.testing.assert_close(out, _expected(q_TNH, inputs, keys, values, 0.3, window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [0.4, 50.0])
@pytest.mark.parametrize("window", [None, 3])
def test_paged_attention_with_bent_scores_equals_formula(softcap, window):
    lens = [(1, 6), (4, 4), (3, 11), (1, 1)]
    cache, inputs, keys, values = _step(lens)
    q_TNH = torch.randn(9, HEADS, HEAD_DIM)
    k_TKH, v_TKH = (torch.cat([x[-q:] for x, (q, _) in zip(xs, lens, strict=True)]) for xs in (keys, values))
    out = reference.paged_attention(q_TNH, k_TKH, v_TKH, cache, inputs, 0.3, window, softcap)
    expected = _expected(q_TNH, inputs, keys, values, 0.3, window, softcap)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    straight = _expected(q_TNH, inputs, keys, values, 0.3, window)
    assert (expected - straight).abs().max() > (0.1 if softcap < 1 else 0)


@pytest.mark.parametrize("window", [2, 5])
def test_paged_attention_sees_a_range_from_its_begin_whatever_the_window(window):
    """Row 0 is a whole prompt whose tokens 1..5 see one another; row 1 decodes; row 2 continues with a span 6..8."""
    lens = [(7, 7), (1, 5), (4, 9)]
    ends = [1, 6, 6, 6, 6, 6, 7, 5, 6, 9, 9, 9]
    begins = [0, 1, 1, 1, 1, 1, 6, 4, 5, 6, 6, 6]
    cache, inputs, keys, values = _step(lens, ends, begins)
    q_TNH = torch.randn(12, HEADS, HEAD_DIM)
    k_TKH, v_TKH = (torch.cat([x[-q:] for x, (q, _) in zip(xs, lens, strict=True)]) for xs in (keys, values))
    out = reference.paged_attention(q_TNH, k_TKH, v_TKH, cache, inputs, 0.3, window)
    torch.testing.assert_close(out, _expected(q_TNH, inputs, keys, values, 0.3, window), atol=1e-5, rtol=1e-5)
    cut = reference.paged_attention(
        q_TNH, k_TKH, v_TKH, cache, dataclasses.replace(inputs, visible_begin_T=None), 0.3, window
    )
    positions = [*range(7), 4, *range(5, 9)]
    further = [begin <= position - window for begin, position in zip(begins, positions, strict=True)]
    assert ((out - cut).abs().amax((1, 2)) > 1e-4).tolist() == further


@pytest.mark.parametrize("window", [None, 5])
def test_paged_attention_inside_a_span_sees_its_end(window):
    """Row 0 is a whole prompt whose tokens 2..5 see one another; row 1 decodes; row 2 continues with a span 6..8."""
    lens = [(7, 7), (1, 5), (4, 9)]
    ends = [1, 2, 6, 6, 6, 6, 7, 5, 6, 9, 9, 9]
    cache, inputs, keys, values = _step(lens, ends)
    q_TNH = torch.randn(12, HEADS, HEAD_DIM)
    k_TKH, v_TKH = (torch.cat([x[-q:] for x, (q, _) in zip(xs, lens, strict=True)]) for xs in (keys, values))
    out = reference.paged_attention(q_TNH, k_TKH, v_TKH, cache, inputs, 0.3, window)
    torch.testing.assert_close(out, _expected(q_TNH, inputs, keys, values, 0.3, window), atol=1e-5, rtol=1e-5)


def test_write_kv_stores_at_slots_and_nowhere_else():
    cache = LayerCache(torch.zeros(3, BLOCK, KV_HEADS, HEAD_DIM), torch.zeros(3, BLOCK, KV_HEADS, HEAD_DIM))
    k, v = torch.randn(2, KV_HEADS, HEAD_DIM), torch.randn(2, KV_HEADS, HEAD_DIM)
    reference.write_kv(k, v, cache, torch.tensor([9, 6]))
    assert torch.equal(cache.key[2, 1], k[0])
    assert torch.equal(cache.value[1, 2], v[1])
    assert cache.key.abs().sum() == k.abs().sum()


@pytest.mark.parametrize("on_host", [True, False], ids=["known", "on-device"])
@pytest.mark.parametrize("seq_lens", [(4, 4, 4), (3, 3, 5, 1, 3), (6,), (2, 0, 5, 0, 0)], ids=str)
def test_varlen_attention_keeps_sequences_apart(seq_lens, on_host):
    total = sum(seq_lens)
    q, k, v = (torch.randn(total, HEADS, HEAD_DIM) for _ in range(3))
    cu = torch.tensor([0, *seq_lens]).cumsum(0).int()
    out = reference.varlen_attention(q, k, v, cu, seq_lens if on_host else None, 0.25)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        scores = torch.einsum("qnh,knh->nqk", q[begin:end], k[begin:end]) * 0.25
        expected = torch.einsum("nqk,knh->qnh", scores.softmax(-1), v[begin:end])
        torch.testing.assert_close(out[begin:end], expected)


@pytest.mark.parametrize("rotated", [HEAD_DIM, HEAD_DIM // 2], ids=["whole-head", "half-head"])
def test_apply_rope_turns_pairs_by_their_angle(rotated):
    pairs = rotated // 2
    q, k = torch.randn(3, HEADS, HEAD_DIM), torch.randn(3, KV_HEADS, HEAD_DIM)
    angles = torch.randn(3, pairs)
    turned, _ = reference.apply_rope(q, k, angles.cos(), angles.sin())
    as_complex = (
        torch.complex(q[..., :pairs], q[..., pairs:rotated]) * torch.polar(torch.ones(3, pairs), angles)[:, None]
    )
    expected = torch.cat([as_complex.real, as_complex.imag, q[..., rotated:]], dim=-1)
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["float32-weight", "same-dtype"])
def test_rms_norm_adds_residual_then_normalises(weight_dtype):
    x, residual = (torch.randn(3, 16, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(16, dtype=weight_dtype)
    normed, summed = reference.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(summed, x + residual)
    exact = summed.double()
    exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed.double(), exact, atol=0.02, rtol=0.01)
    assert torch.equal(reference.rms_norm(x, weight, 1e-5)[1], x)


def test_activations_equal_their_formulas():
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    cube = x + 0.044715 * x**3
    expected = {
        "silu": x / (1 + torch.exp(-x)),
        "gelu": x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_pytorch_tanh": 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * cube)),
        "quick_gelu": x / (1 + torch.exp(-1.702 * x)),
    }
    for name, values in expected.items():
        torch.testing.assert_close(reference.activation(x, name), values)
        gated = reference.gated_activation(torch.cat([x, 3 * x]), name)
        torch.testing.assert_close(gated, values * 3 * x)


def test_patchify_equals_convolution_and_cuts_ragged_edges():
    tiles = torch.randint(0, 256, (2, 9, 14, 3), dtype=torch.uint8)
    norm = PixelNorm(1 / 255, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    patches = reference.patchify(tiles, 4, torch.from_numpy(norm.table()), torch.float32)
    assert patches.shape == (2 * 2 * 3, 48)
    pixels = ((tiles / 255 - torch.tensor(norm.mean)) / torch.tensor(norm.std)).permute(0, 3, 1, 2)
    kernel = torch.randn(5, 3, 4, 4)
    expected = torch.nn.functional.conv2d(pixels, kernel, stride=4).flatten(2).transpose(1, 2).reshape(12, 5)
    torch.testing.assert_close(patches @ kernel.view(5, -1).T, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_packed_linear_equals_reference(dtype, num_tokens):
    kernels = select(CPU, "packed")
    weight, bias = torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype)
    x = torch.randn(16, num_tokens, dtype=dtype).T  # not contiguous
    out = kernels.linear(x, kernels.pack_linear(weight), bias)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(out, reference.linear(x, weight, bias), atol=tolerance, rtol=tolerance)


def test_packed_normed_linear_equals_reference():
    kernels = select(CPU, "packed")
    x, residual, norm, weight, bias = (torch.randn(*shape) for shape in ((5, 16), (5, 16), (16,), (24, 16), (24,)))
    got = kernels.normed_linear(x, residual, norm, 1e-6, kernels.pack_linear(weight), bias, "silu")
    expected = reference.KERNELS.normed_linear(x, residual, norm, 1e-6, weight, bias, "silu")
    assert got[0].shape == (5, 12)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_select_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"kernels is 'fast'; it must be one of auto, reference, packed"):
        select(CPU, "fast")


def test_select_packed_off_the_cpu_is_refused():
    with pytest.raises(ConfigError, match="needs a CPU"):
        select(torch.device("meta"), "packed")


def test_select_auto_differs_by_device():
    assert isinstance(select(CPU), Kernels)
    assert select(torch.device("meta")) is reference.KERNELS
