"""Linear layers. Each says which of its axes tensor parallelism would shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from opsin.kernels.quantized import FP8, UNIT, QuantizedRows
from opsin.layers import Placement
from opsin.layers.norm import LayerNorm, RMSNorm, added

ShardAxis = Literal["out", "in"]


class Linear(nn.Module):
    """y = x @ weight.T + bias.

    Attributes:
        may_be_quantized: False where something is done to the weight before it is multiplied, or quality forbids it.
        shard: the axis to split over ranks: 'out' features (outputs stay apart), 'in' features (outputs are summed),
            or None for a copy on each.
        checkpoint_shape: the weight's shape in checkpoints where it is not (out, in), as for a convolution.
        num_spare_inputs: behind the checkpoint's own, and multiplied by zeros; see ``spare``.
        weight_scale: float32 (out,), what the rows of a quantised (e4m3 or int8) weight are multiplied by; else None.
    """

    may_be_quantized: ClassVar[bool] = True

    def __init__(
        self,
        place: Placement,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        shard: ShardAxis | None = None,
        checkpoint_shape: tuple[int, ...] | None = None,
        num_spare_inputs: int = 0,
    ) -> None:
        super().__init__()
        self.kernels = place.kernels
        self.place = place
        self.shard = shard
        self.checkpoint_shape = checkpoint_shape
        self.num_spare_inputs = num_spare_inputs
        where = place._replace(device=torch.device("meta")) if place.defers_linears else place
        self.weight = where.parameter(out_features, in_features + num_spare_inputs)
        self.weight_scale: nn.Parameter | None = None
        self.bias = place.parameter(out_features) if bias else None

    @property
    def is_quantizable(self) -> bool:
        """Whether kernels for quantised weights take this layer: both sizes are multiples of 16."""
        fits = all(size % UNIT == 0 for size in self.weight.shape)
        return self.may_be_quantized and self.checkpoint_shape is None and fits

    @property
    def is_fp8(self) -> bool:
        """Whether inputs are quantised, too, which what makes them can do on its way."""
        return self.weight_scale is not None and self.weight.dtype == FP8

    def allocate(self, kind: torch.dtype | None) -> None:
        """Give a deferred weight its memory: e4m3 or int8 with scales, or the model's dtype where ``kind`` is None."""
        if kind is not None:
            self.weight_scale = self.place._replace(dtype=torch.float32).parameter(self.weight.shape[0])
        place = self.place if kind is None else self.place._replace(dtype=kind)
        self.weight = place.parameter(*self.weight.shape)

    def pack(self) -> None:
        """Bring the loaded weight into the kernels' own form; call once, after loading."""
        if self.weight_scale is not None:  # as it is, rows one after the other, it is the form that the products want
            return
        packed = self.kernels.pack_linear(self.weight)
        if packed is not self.weight:  # a tied head keeps the very parameter, which is counted once
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        if self.is_fp8:
            return self._product(self.kernels.quantize_rows(x_TI), x_TI.dtype)
        if self.weight_scale is None:
            return self.kernels.linear(x_TI, self.weight, self.bias)
        return self.kernels.int8_linear(x_TI, self.weight, self.weight_scale, self.bias)

    def activated(self, x_TI: torch.Tensor, act: str) -> torch.Tensor:
        """self(act(x))."""
        if self.is_fp8:
            return self._product(self.kernels.quantized_activation(x_TI, act), x_TI.dtype)
        return self(self.kernels.activation(x_TI, act))

    def gated(self, gate_up_T2I: torch.Tensor, act: str) -> torch.Tensor:
        """self(act(gate) * up)."""
        if self.is_fp8:
            return self._product(self.kernels.quantized_gated_activation(gate_up_T2I, act), gate_up_T2I.dtype)
        return self(self.kernels.gated_activation(gate_up_T2I, act))

    def normed(
        self,
        norm: LayerNorm | RMSNorm,
        x_TI: torch.Tensor,
        residual_TI: torch.Tensor | None = None,
        gate: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(self(norm(x + residual)), x + residual); the former gated where ``gate`` names an activation."""
        if self.weight_scale is None and isinstance(norm, RMSNorm):
            return self.kernels.normed_linear(x_TI, residual_TI, norm.weight, norm.eps, self.weight, self.bias, gate)
        if self.is_fp8:
            rows, sum_TI = norm.quantized(x_TI, residual_TI)
            y_TO = self._product(rows, x_TI.dtype)
        else:
            normed_TI, sum_TI = added(norm, x_TI, residual_TI)
            y_TO = self(normed_TI)
        return y_TO if gate is None else self.kernels.gated_activation(y_TO, gate), sum_TI

    def _product(self, rows: QuantizedRows, dtype: torch.dtype) -> torch.Tensor:
        assert self.weight_scale is not None
        return self.kernels.quantized_linear(rows, self.weight, self.weight_scale, self.bias, dtype)


class MergedLinear(Linear):
    """Several linear layers of one input as a single matrix product.

    Args:
        pieces: checkpoint name to output size, in order: ``{"q_proj": 512, "k_proj": 128, "v_proj": 128}``. A
            checkpoint may hold the pieces, or the merged weight under this layer's own name.
        num_spare: outputs of zero behind each piece's own; see ``spare``.
    """

    def __init__(
        self, place: Placement, in_features: int, pieces: Mapping[str, int], *, bias: bool, num_spare: int = 0
    ) -> None:
        super().__init__(place, in_features, sum(pieces.values()) + num_spare * len(pieces), bias=bias, shard="out")
        self.pieces = dict(pieces)
        self.num_spare = num_spare

    def split(self, y_TO: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pieces' outputs, as views; with what is spare behind each."""
        return y_TO.split([size + self.num_spare for size in self.pieces.values()], dim=-1)


def spare(width: int) -> int:
    """What is missing to a width that tensor cores take at full speed, in 8 bits at all: a multiple of 16.

    A product of 3,420 inputs in bfloat16 is read at no address that a Hopper GPU's copy engine accepts.
    """
    return -width % UNIT
