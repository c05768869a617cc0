"""One protocol per operation, and ``Kernels``, an implementation of them all.

Shape letters as in ``opsin.kernels.inputs``; I and O are a linear layer's input and output widths, R rotary pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.quantized import QuantizedRows


class PackLinear(Protocol):
    def __call__(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Bring a finished weight into the form that ``linear`` reads fastest; may return it unchanged."""
        ...


class Linear(Protocol):
    def __call__(self, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        """x @ weight.T + bias; ``weight_OI`` as ``pack_linear`` returned it."""
        ...


class QuantizeRows(Protocol):
    def __call__(self, x_TI: torch.Tensor) -> QuantizedRows:
        """e4m3 with a scale for each row, by the row's largest value."""
        ...


class QuantizedLinear(Protocol):
    def __call__(
        self,
        x: QuantizedRows,
        weight_OI: torch.Tensor,
        scale_O: torch.Tensor,
        bias_O: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """x @ (weight * scale).T + bias in ``dtype``; the weight is e4m3, both its sizes multiples of 16."""
        ...


class Int8Linear(Protocol):
    def __call__(
        self, x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        """x @ (weight * scale).T + bias; the weight is int8, both its sizes multiples of 16."""
        ...


class RmsNorm(Protocol):
    def __call__(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add ``residual_TD`` to ``x_TD`` where given; return (normalised sum, the sum)."""
        ...


class LayerNorm(Protocol):
    def __call__(
        self,
        x_TD: torch.Tensor,
        weight_D: torch.Tensor,
        bias_D: torch.Tensor,
        eps: float,
        residual_TD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``RmsNorm``: (normalised sum, the sum)."""
        ...


class QuantizedRmsNorm(Protocol):
    def __call__(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
    ) -> tuple[QuantizedRows, torch.Tensor]:
        """``RmsNorm``, then ``quantize_rows`` of its first result, rounded to the dtype between the two."""
        ...


class QuantizedLayerNorm(Protocol):
    def __call__(
        self,
        x_TD: torch.Tensor,
        weight_D: torch.Tensor,
        bias_D: torch.Tensor,
        eps: float,
        residual_TD: torch.Tensor | None = None,
    ) -> tuple[QuantizedRows, torch.Tensor]:
        """As ``QuantizedRmsNorm``, of ``LayerNorm``."""
        ...


class Activation(Protocol):
    def __call__(self, x_TF: torch.Tensor, name: str) -> torch.Tensor:
        """``name`` is one of Hugging Face's activation names; see ``reference.ACTIVATIONS``."""
        ...


class GatedActivation(Protocol):
    def __call__(self, gate_up_T2F: torch.Tensor, name: str) -> torch.Tensor:
        """activation(first half) * second half: (T, F)."""
        ...


class QuantizedActivation(Protocol):
    def __call__(self, x: torch.Tensor, name: str, /) -> QuantizedRows:
        """``Activation``, or ``GatedActivation``, then ``quantize_rows``, rounded to the dtype between the two."""
        ...


class NormedLinear(Protocol):
    def __call__(
        self,
        x_TI: torch.Tensor,
        residual_TI: torch.Tensor | None,
        norm_I: torch.Tensor,
        eps: float,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        gate: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``rms_norm``, then ``linear``, then ``gated_activation`` where ``gate`` names one; and the norm's sum."""
        ...


class ApplyRope(Protocol):
    def __call__(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the first 2R values of each head; R pairs (i, i + R)."""
        ...


class WriteKV(Protocol):
    def __call__(
        self, k_TKH: torch.Tensor, v_TKH: torch.Tensor, cache: LayerCache, slot_mapping_T: torch.Tensor
    ) -> None:
        """Store this step's keys and values at their slots, in place, in the cache's dtype (``quantized.narrowed``)."""
        ...


class RopeAndWrite(Protocol):
    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        cache: LayerCache,
        slot_mapping_T: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``apply_rope``, then ``write_kv`` of the rotated keys; returns queries and keys, rotated."""
        ...


class PagedAttention(Protocol):
    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        cache: LayerCache,
        inputs: AttentionInputs,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Attention of each row's tokens over its context: (T, N, H).

        Token t sees positions in (position - window, visible_end), its own included, and those from visible_begin on
        where that is lower. ``k_TKH`` and ``v_TKH`` are this step's, already written to ``cache``, for rows that need
        nothing older, and none that was rounded on its way there.

        Args:
            softcap: scores are bent into (-softcap, softcap) by tanh, arXiv:2408.00118.
        """
        ...


class VarlenAttention(Protocol):
    def __call__(
        self,
        q_PNH: torch.Tensor,
        k_PNH: torch.Tensor,
        v_PNH: torch.Tensor,
        cu_seqlens_B1: torch.Tensor,
        seq_lens: tuple[int, ...] | None,
        scale: float,
    ) -> torch.Tensor:
        """Every token sees all of its own sequence and nothing else; a sequence may be empty.

        Args:
            seq_lens: the host's copy of the lengths; None where only the device knows them.
        """
        ...


class Patchify(Protocol):
    def __call__(
        self, tiles_BYX3: torch.Tensor, patch_size: int, table_3: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """uint8 tiles to (B * patches, 3 * patch_size**2), normalised.

        Patches go row by row; values within one are ordered channel, y, x, as a convolution's kernel is.

        Args:
            table_3: float32 (256, 3), the normalised value of every byte per channel (``PixelNorm.table``).
        """
        ...


class Resample(Protocol):
    def __call__(self, picture_YX3: torch.Tensor, taps: torch.Tensor, axis: int, out_YX3: torch.Tensor) -> None:
        """One pass of a resize, with Pillow's integers: fills ``out_YX3``. Both are uint8.

        Args:
            picture_YX3: bytes of a row lie side by side; rows may lie apart.
            taps: int32 (1 + taps, pixels of ``out_YX3`` along ``axis``), as ``media.resample.make_taps`` makes them.
            axis: 0 down the picture, 1 across it.
            out_YX3: contiguous.
        """
        ...


class Greedy(Protocol):
    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """int64 (2, B): the likeliest token, the first of equals; 1 where the row's largest is a finite number, else 0.

        Any token of the vocabulary stands where it is not.
        """
        ...


class CompileAhead(Protocol):
    def __call__(self, *works: Callable[[], None]) -> None:
        """Have whatever the works launch compiled before they are done in earnest; nothing where nothing is compiled.

        The works are done to find that out, each only where something had to be compiled for those before it. A kernel
        that is not there yet is left out, so what they compute is rubbish, and nothing may be indexed by it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every operation.

    ``replayable``: none looks at the host's copies of lengths but to bound its work, so a pass can be captured in a
    graph and replayed on other rows.
    """

    pack_linear: PackLinear
    linear: Linear
    quantize_rows: QuantizeRows
    quantized_linear: QuantizedLinear
    int8_linear: Int8Linear
    rms_norm: RmsNorm
    layer_norm: LayerNorm
    activation: Activation
    gated_activation: GatedActivation
    quantized_rms_norm: QuantizedRmsNorm
    quantized_layer_norm: QuantizedLayerNorm
    quantized_activation: QuantizedActivation
    quantized_gated_activation: QuantizedActivation
    normed_linear: NormedLinear
    apply_rope: ApplyRope
    write_kv: WriteKV
    rope_and_write: RopeAndWrite
    paged_attention: PagedAttention
    varlen_attention: VarlenAttention
    patchify: Patchify
    resample: Resample
    greedy: Greedy
    compile_ahead: CompileAhead
    replayable: bool = False
