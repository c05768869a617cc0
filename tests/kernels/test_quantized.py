"""Linear layers of 8 bits: the reference against plain arithmetic in float64, and the CPU's kernel against it."""

from __future__ import annotations

import pytest
import torch

from opsin.kernels import packed
from opsin.kernels.quantized import FP8, INT8, int8_linear, quantize_rows, quantize_weight, quantized_linear


def test_rows_are_scaled_to_the_largest_number_and_rounded_to_three_bits():
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1], [50], [1e4], [0.1]])
    values, scale = quantize_rows(x)
    assert values.dtype == FP8
    assert scale.shape == (5, 1)
    assert values.float().abs().amax(1).eq(448).all()
    error = (values.float() * scale - x).abs()
    # Half of the last of three bits, and of the step among the smallest numbers, 2**-9.
    assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10)).all()
    assert error.max() > 0


def test_rows_of_zeros_stay_zeros():
    values, scale = quantize_rows(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert values.float().eq(0).all()
    assert scale.isfinite().all()


def test_rows_with_a_nan_or_an_infinity_show_it_and_the_others_do_not():
    x = torch.ones(3, 16)
    x[0, 3], x[2, 5] = float("nan"), float("inf")
    values, scale = quantize_rows(x)
    weight, weight_scale = quantize_rows(torch.ones(16, 16))
    y = quantized_linear(quantize_rows(x), weight, weight_scale.squeeze(1), None, torch.float32)
    assert y[0].isnan().all()
    assert not y[2].isfinite().any()
    torch.testing.assert_close(y[1], torch.full((16,), 16.0))
    assert (values[1].float() * scale[1]).sub(1).abs().max() < 1e-6


def test_product_equals_that_of_the_rounded_numbers():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((2, 7, 64), (32, 64), (32,)))
    rows, (values, scale) = quantize_rows(x), quantize_rows(weight)
    expected = (rows.values_TI.double() * rows.scale_T1) @ (values.double() * scale).T + bias
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        got = quantized_linear(rows, values, scale.squeeze(1), bias.to(dtype), dtype)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    # And stays near the product that it stands for: every factor is at most 2**-4 off.
    exact = x.double() @ weight.double().T + bias
    assert (expected - exact).norm() / exact.norm() < 0.05


def test_integers_are_the_nearest_ones_and_their_scales_fit_every_dtype():
    weight = (
        torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-4, 1, 9, 0.1, 1e3, 0]]).T
    )
    values, scale = quantize_weight(weight, INT8)
    assert values.dtype == INT8
    assert torch.equal(scale, scale.bfloat16().float())
    assert values[5].eq(0).all()
    assert values[:5].abs().amax(1).ge(126).all()
    # Half a step, and for a row's largest value what its scale lost in bfloat16: 127 * 2**-9 of a step.
    assert ((values * scale - weight).abs() <= 0.75 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 40])  # around the border between the two ways
def test_integer_products_on_a_cpu_equal_the_reference(dtype: torch.dtype, has_bias: bool, rows: int):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((rows, 48), (2064, 48), (2064,)))
    values, scale = quantize_weight(weight, INT8)
    given = (x.to(dtype), values, scale.squeeze(1), bias.to(dtype) if has_bias else None)
    expected = x.to(dtype).double() @ (values.double() * scale).T + (bias.to(dtype).double() if has_bias else 0)
    for linear in (int8_linear, packed.int8_linear):
        got = linear(*given)
        assert got.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * 8)
    assert torch.equal(
        packed.int8_linear(given[0].view(rows, 1, 48), *given[1:]).view(rows, -1), packed.int8_linear(*given)
    )
