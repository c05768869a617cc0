"""e4m3 linear layers: the reference against plain arithmetic in float64."""

from __future__ import annotations

import torch

from opsin.kernels.quantized import FP8, quantize_rows, quantized_linear


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
