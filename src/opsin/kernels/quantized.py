"""8-bit floating point for linear layers, in plain torch: what is correct, and what devices without kernels run.

Weights are e4m3 (arXiv:2209.05433) with one scale for each output feature, kept; activations are e4m3 with one scale
for each row, found as they come. A product of two such numbers is exact in float32, so kernels that sum in float32
differ in the order of the sum alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_UNIT = 16
"""Both widths of a product must be multiples of this, the tensor cores' load."""
SMALLEST = 1e-12  # of a row's largest value: a row of zeros has a scale, too


class QuantizedRows(NamedTuple):
    """``values_TI`` (e4m3) times ``scale_T1`` (float32)."""

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
