"""Products of few heights are the products, and there are few of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.kernels import onednn, packed
from opsin.kernels.onednn import bucket, padded, product


def test_buckets_are_few_and_near():
    found = {bucket(size) for size in range(2049)}
    assert len(found) < 60
    assert all(size <= bucket(size) <= size * 1.26 for size in range(2049))
    assert all(bucket(size) <= size * 1.13 for size in range(129, 2049))
    assert all(bucket(size) == size for size in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (9,), (2, 3, 11), (130,)], ids=str)
def test_product_equals_that_of_the_rows_alone(dtype: torch.dtype, shape: tuple[int, ...]):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, 48).to(dtype), torch.randn(40, 48).to(dtype), torch.randn(40).to(dtype)
    for given in (weight, packed.pack_linear(weight)):
        for added in (None, bias):
            expected = torch.nn.functional.linear(x, weight, added)
            got = product(x, given, added)
            assert got.shape == expected.shape
            assert got.dtype == dtype
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 8)


def test_padding_copies_nothing_where_there_is_none_to_do():
    x = torch.randn(16, 4)
    assert padded(x) is x
    assert padded(x[:15]).shape == (16, 4)
    assert padded(x[:15])[15].eq(0).all()


def test_long_attention_meets_few_shapes(monkeypatch: pytest.MonkeyPatch):
    """Each shape costs a program that is kept; prompts come in all lengths."""
    shapes: set[Any] = set()
    real = torch.ops.mkldnn._linear_pointwise

    def noting(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.add((tuple(x.shape), tuple(weight.shape)))
        return real(x, weight, *rest)

    monkeypatch.setattr(onednn.torch.ops.mkldnn, "_linear_pointwise", noting)
    lengths = range(193, 321)
    for length in lengths:
        q, k = torch.randn(length, 2, 16), torch.randn(length, 1, 16)
        packed.KERNELS.varlen_attention(q, k, k, torch.tensor([0, length]).int(), (length,), 0.25)
    assert len(shapes) < len(lengths) / 2
