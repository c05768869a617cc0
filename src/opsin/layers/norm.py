"""Norms."""

from __future__ import annotations

import torch
from torch import nn

from opsin.kernels.quantized import QuantizedRows
from opsin.layers import Placement


class RMSNorm(nn.Module):
    """arXiv:1910.07467.

    Args:
        from_one: checkpoints hold the weight's difference from 1, as Gemma's do.
    """

    def __init__(self, place: Placement, size: int, eps: float, *, from_one: bool = False) -> None:
        super().__init__()
        self.kernels = place.kernels
        self.eps = eps
        self.from_one = from_one
        self.weight = place.parameter(size)

    def pack(self) -> None:
        """Add the 1, in float32, since half precision would round small differences away; call once, after loading."""
        if self.from_one:
            self.weight = nn.Parameter(1.0 + self.weight.float(), requires_grad=False)

    def forward(self, x_TD: torch.Tensor, residual_TD: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual)."""
        return self.kernels.rms_norm(x_TD, self.weight, self.eps, residual_TD)

    def quantized(self, x_TD: torch.Tensor, residual_TD: torch.Tensor | None) -> tuple[QuantizedRows, torch.Tensor]:
        """(norm(x + residual) in e4m3, x + residual)."""
        return self.kernels.quantized_rms_norm(x_TD, self.weight, self.eps, residual_TD)


class LayerNorm(nn.Module):
    def __init__(self, place: Placement, size: int, eps: float) -> None:
        super().__init__()
        self.kernels = place.kernels
        self.eps = eps
        self.weight = place.parameter(size)
        self.bias = place.parameter(size)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.kernels.layer_norm(x_TD, self.weight, self.bias, self.eps)[0]

    def add(self, x_TD: torch.Tensor, residual_TD: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), in one pass."""
        return self.kernels.layer_norm(x_TD, self.weight, self.bias, self.eps, residual_TD)

    def quantized(self, x_TD: torch.Tensor, residual_TD: torch.Tensor | None) -> tuple[QuantizedRows, torch.Tensor]:
        """(norm(x + residual) in e4m3, x + residual)."""
        return self.kernels.quantized_layer_norm(x_TD, self.weight, self.bias, self.eps, residual_TD)


def added(
    norm: LayerNorm | RMSNorm, x_TD: torch.Tensor, residual_TD: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual), for towers that have the one or the other."""
    return norm(x_TD, residual_TD) if isinstance(norm, RMSNorm) else norm.add(x_TD, residual_TD)


def normed(norm: LayerNorm | RMSNorm, x_TD: torch.Tensor) -> torch.Tensor:
    """norm(x), for towers that have the one or the other."""
    return norm(x_TD)[0] if isinstance(norm, RMSNorm) else norm(x_TD)
