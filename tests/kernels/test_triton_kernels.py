"""Every Triton kernel against the plain-torch reference, over shapes and dtypes.

On a CUDA device as compiled there; elsewhere in Triton's interpreter, which runs the same source on numpy arrays, at
smaller sizes. The interpreter proves indices, masks and arithmetic, not what a compiler makes of them, and not speed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.kernels import quantized, reference
from opsin.kernels.inputs import LayerCache
from opsin.media.resample import make_taps
from tests.kernels.triton_cases import (
    COMPUTED_DTYPES,
    DEVICE,
    DTYPES,
    HAS_CUDA,
    NEEDS_FP8,
    TOLERANCE,
    assert_close,
    rand,
    sized,
)

pytestmark = pytest.mark.gpu if HAS_CUDA else []


@pytest.mark.parametrize("dtype", COMPUTED_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 896), sized((300, 1536), (9, 1536)), (3, 5120)])
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


@pytest.mark.parametrize("dtype", COMPUTED_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 100), sized((33, 8960), (3, 2500))])
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


@pytest.mark.parametrize("dtype", COMPUTED_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 1152), sized((300, 1280), (9, 1280))])
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
    x = rand(*sized((33, 5121), (3, 2801)), dtype=dtype)
    assert_close(kernels.activation(x, name), reference.activation(x, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv", "size", "pairs"), [(4, 2, 16, 8), (12, 2, 128, 64), (5, 5, 80, 20)])
def test_rope_and_write_equals_reference(kernels: Any, dtype: torch.dtype, heads: int, kv: int, size: int, pairs: int):
    fused = rand(9, heads + 2 * kv, size, dtype=dtype)
    q, k, v = fused.split((heads, kv, kv), dim=1)
    angle = rand(9, pairs, seed=2)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:9].to(DEVICE)
    caches = [LayerCache(*(torch.zeros(10, 4, kv, size, dtype=dtype, device=DEVICE) for _ in "kv")) for _ in range(2)]
    for got, expected in zip(
        kernels.rope_and_write(q, k, v, angle.cos(), angle.sin(), caches[0], slots),
        reference.rope_and_write(q, k, v, angle.cos(), angle.sin(), caches[1], slots),
        strict=True,
    ):
        assert_close(got, expected)
    for got, expected in zip(*caches, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_equals_reference_and_takes_the_first_of_equals(kernels: Any, dtype: torch.dtype):
    logits = rand(6, 151936, dtype=dtype)
    logits[0, 151935] = 9.0
    logits[1, 2047] = logits[1, 2048] = logits[1, 2050] = logits[1, 150000] = 9.0
    logits[2, 5], logits[3, 8], logits[4] = float("nan"), float("inf"), float("-inf")
    ids, finite = kernels.greedy(logits)
    expected_ids, expected_finite = reference.greedy(logits)
    assert torch.equal(finite, expected_finite)
    assert finite.tolist() == [1, 1, 0, 0, 0, 1]
    assert torch.equal(ids[finite == 1], expected_ids[finite == 1])
    assert ids[0] == 151935
    assert ids[1] == 2047
    assert ((ids >= 0) & (ids < 151936)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("num_in", "num_out"), [(64, 50), sized((1536, 2048), (1536, 21)), sized((8960, 1536), (8960, 5)), (1280, 3)]
)
def test_linear_equals_reference(kernels: Any, dtype: torch.dtype, rows: int, num_in: int, num_out: int):
    x, weight = rand(rows, num_in, dtype=dtype), rand(num_out, num_in, seed=1).mul_(num_in**-0.5).to(dtype)
    for bias in (None, rand(num_out, dtype=dtype, seed=2)):
        expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_close(kernels.linear(x, weight, bias), expected.to(dtype))


@pytest.mark.parametrize("dtype", COMPUTED_DTYPES, ids=str)
@pytest.mark.parametrize("gate", [None, "silu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("num_in", "num_out"), [(64, 50), sized((1536, 17920), (1536, 42)), sized((3584, 4608), (3584, 10))]
)
def test_normed_linear_equals_reference(
    kernels: Any, dtype: torch.dtype, gate: str | None, rows: int, num_in: int, num_out: int
):
    x, residual = rand(rows, num_in, dtype=dtype), rand(rows, num_in, dtype=dtype, seed=3)
    weight, offset = rand(num_out, num_in, seed=1).mul_(num_in**-0.5).to(dtype), rand(num_out, dtype=dtype, seed=2)
    norm = rand(num_in, seed=4)
    for added, factor, bias in ((None, norm.to(dtype), None), (residual, norm, offset)):
        normed, expected_sum = reference.rms_norm(x, factor, 1e-6, added)
        expected = reference.linear(normed.double(), weight.double(), None if bias is None else bias.double()).to(dtype)
        got, sum_ = kernels.normed_linear(x, added, factor, 1e-6, weight, bias, gate)
        assert torch.equal(sum_, expected_sum)
        assert_close(got, expected if gate is None else reference.gated_activation(expected, gate))


@NEEDS_FP8
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 48), (4304, 16)])
def test_few_quantized_rows_equal_the_reference(kernels: Any, rows: int, num_in: int, num_out: int):
    """Products only: the interpreter cuts numbers to 8 bits where a GPU rounds them. More rows are cuBLAS's."""
    x = quantized.quantize_rows(rand(rows, num_in))
    weight, scale = quantized.quantize_rows(rand(num_out, num_in, seed=1) * num_in**-0.5)
    for dtype in (torch.float16, torch.float32):
        for bias in (None, rand(num_out, dtype=dtype, seed=2)):
            expected = quantized.quantized_linear(x, weight, scale.squeeze(1), bias, torch.float32)
            got = kernels.quantized_linear(x, weight, scale.squeeze(1), bias, dtype)
            torch.testing.assert_close(got, expected.to(dtype), rtol=5e-3, atol=5e-3)


def assert_same_rows(got: quantized.QuantizedRows, expected: quantized.QuantizedRows) -> None:
    """To the bit where sums have one order, as in the interpreter. A compiler may choose another, which moves a norm's
    value, and a row's scale with it, by the last bit of the dtype, and few values to their neighbours."""
    assert got.values_TI.dtype == quantized.FP8
    assert got.values_TI.shape == expected.values_TI.shape
    torch.testing.assert_close(got.scale_T1, expected.scale_T1, rtol=2**-7 if HAS_CUDA else 0, atol=0)
    is_same = got.values_TI.view(torch.uint8) == expected.values_TI.view(torch.uint8)
    assert is_same.float().mean() > 0.97 if HAS_CUDA else is_same.all()
    torch.testing.assert_close(got.values_TI.float(), expected.values_TI.float(), rtol=2**-3, atol=2**-9)


@NEEDS_FP8
@pytest.mark.parametrize("dtype", COMPUTED_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("width", [16, 1280, 3584])
def test_quantized_norms_equal_their_two_steps(kernels: Any, dtype: torch.dtype, kind: str, width: int):
    x, residual = rand(5, width, dtype=dtype), rand(5, width, dtype=dtype, seed=3)
    x[1] = residual[1] = 0
    parameters = [rand(width, dtype=dtype, seed=seed) for seed in ((1,) if kind == "rms_norm" else (1, 2))]
    norm, fused, plain = (
        getattr(owner, name)
        for owner, name in ((kernels, kind), (kernels, f"quantized_{kind}"), (reference, f"quantized_{kind}"))
    )
    for given in (None, residual):
        normed, expected_sum = norm(x, *parameters, 1e-6, given)
        rows, got_sum = fused(x, *parameters, 1e-6, given)
        assert torch.equal(got_sum, expected_sum)
        assert_same_rows(rows, kernels.quantize_rows(normed))
        torch.testing.assert_close(
            rows.scale_T1, plain(x, *parameters, 1e-6, given)[0].scale_T1, rtol=TOLERANCE[dtype], atol=0
        )
    apart = rand(5, 2 * width, dtype=dtype)[:, ::2]  # what no kernel takes
    normed = norm(apart, *parameters, 1e-6)[0]
    assert_same_rows(fused(apart, *parameters, 1e-6)[0], quantized.quantize_rows(normed))


@NEEDS_FP8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu", "quick_gelu", "relu"])
def test_quantized_activation_equals_its_two_steps(kernels: Any, dtype: torch.dtype, name: str):
    x = rand(2, 3, 5120, dtype=dtype)
    x[1, 2] = 0
    expected = kernels.quantize_rows(kernels.activation(x, name))
    assert_same_rows(kernels.quantized_activation(x, name), expected)
    scale = reference.quantized_activation(x, name).scale_T1
    torch.testing.assert_close(expected.scale_T1, scale, rtol=TOLERANCE[dtype], atol=0)


@NEEDS_FP8
@pytest.mark.parametrize("dtype", COMPUTED_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("width", [16, 1040, sized(18944, 9008)])
def test_quantized_gated_activation_equals_its_two_steps(kernels: Any, dtype: torch.dtype, name: str, width: int):
    x = rand(5, 2 * width, dtype=dtype)
    x[1], x[2, :width] = 0, 0
    expected = kernels.quantize_rows(kernels.gated_activation(x.clone(), name))
    assert_same_rows(kernels.quantized_gated_activation(x, name), expected)
    scale = reference.quantized_gated_activation(x.clone(), name).scale_T1
    torch.testing.assert_close(expected.scale_T1, scale, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("num_in", "num_out"), [(30, 56), (70, 9), (1, 9), (9, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_resample_equals_reference(kernels: Any, axis: int, num_in: int, num_out: int, name: str):
    """To the bit, of a picture that is cut out of a larger one, whose other side takes two blocks across."""
    other = 90 if axis == 0 else 6
    height, width = (num_in, other) if axis == 0 else (other, num_in)
    large = rand(height + 3, width + 5, 3).mul_(99).clamp_(0, 255).to(torch.uint8)
    picture = large[2 : 2 + height, 4 : 4 + width]
    taps = torch.from_numpy(make_taps(name, num_in, num_out)).to(DEVICE)
    shape = (num_out, width, 3) if axis == 0 else (height, num_out, 3)
    got, expected = (torch.zeros(shape, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    for own, out in ((kernels, got), (reference, expected)):
        own.resample(picture, taps, axis, out)
    assert torch.equal(got, expected)
    assert got.any()
