"""Devices, dtypes and comparisons of the tests of Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_BFLOAT16 = pytest.mark.skipif(
    not HAS_CUDA, reason="Triton's interpreter keeps bfloat16 as integers, and adds and multiplies those"
)
NEEDS_FP8 = pytest.mark.skipif(
    HAS_CUDA and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no 8-bit tensor cores"
)
# Of kernels that compute in the dtype they are given; the others widen what they load.
COMPUTED_DTYPES = (torch.float32, pytest.param(torch.bfloat16, marks=NO_BFLOAT16), torch.float16)
HALF = torch.bfloat16 if HAS_CUDA else torch.float16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def sized(full: Any, small: Any) -> Any:
    """A case as a GPU runs it, or one that the interpreter ends in time."""
    return full if HAS_CUDA else small


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
