"""8-bit numbers for linear layers, in plain torch: what is correct, and what devices without kernels run.

FP8, for GPUs: weights are e4m3 (arXiv:2209.05433) with one scale for each output feature, kept; activations are e4m3
with one scale for each row, found as they come. A product of two such numbers is exact in float32, so kernels that sum
in float32 differ in the order of the sum alone.

INT8, for CPUs, where a token takes as long as its weights take to be read: weights are integers with one scale for each
output feature; activations stay as they are, since their outliers would cost all the others their precision
(arXiv:2208.07339).

A KV cache may be e4m3, too, on either: half the memory, and half of what attention reads for a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8 = torch.int8
INT8_MAX = 127
UNIT = 16
"""Both widths of a product must be multiples of this, which tensor cores and vector registers load at once."""
SMALLEST = 1e-12  # of a row's largest value: a row of zeros has a scale, too


class QuantizedRows(NamedTuple):
    """``values_TI`` (8 bits each) times ``scale_T1`` (float32)."""

    values_TI: torch.Tensor
    scale_T1: torch.Tensor


def quantize_rows(x_TI: torch.Tensor) -> QuantizedRows:
    """Round each row to e4m3 after scaling its largest value to e4m3's largest, 448. A row with a NaN keeps it."""
    x32_TI = x_TI.float()
    scale_T1 = x32_TI.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / FP8_MAX
    return QuantizedRows((x32_TI / scale_T1).to(FP8), scale_T1)


def quantized_linear(
    x: QuantizedRows, weight_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Scales and bias are applied in float32."""
    y_TO = F.linear(x.values_TI.float(), weight_OI.float()) * x.scale_T1 * scale_O
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(dtype)


def narrowed(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Keys or values as a cache of ``kind`` holds them. e4m3 has no scale there: it spans 2**-9 to 448, which few keys
    leave, and larger ones become 448."""
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(FP8) if kind == FP8 else x


def quantize_weight(weight_OI: torch.Tensor, kind: torch.dtype) -> QuantizedRows:
    """Rows of a weight as ``kind``, ``FP8`` or ``INT8``. Integers get scales that bfloat16 can hold, so that a product
    may be scaled in any dtype."""
    if kind == FP8:
        return quantize_rows(weight_OI)
    weight32_OI = weight_OI.float()
    scale_O1 = (weight32_OI.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / INT8_MAX).bfloat16().float()
    return QuantizedRows((weight32_OI / scale_O1).round().clamp(-INT8_MAX, INT8_MAX).to(INT8), scale_O1)


def int8_linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """Every integer is a number of x's dtype; scales and bias are applied in float32."""
    y_TO = F.linear(x_TI.float(), weight_OI.float()) * scale_O
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)
