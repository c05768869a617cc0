"""Rotary position embedding (arXiv:2104.09864) and its scaled kinds, from a config in either of HF's spellings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from opsin.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_ALIASES = {"su": "longrope", "mrope": "default"}  # Phi-3's and Qwen2-VL's first names for them


class Rotary(NamedTuple):
    """What a step's tokens are rotated by; float32, (T, R), R pairs per head. Contiguous, else layers would copy it."""

    cos_TR: torch.Tensor
    sin_TR: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Frequencies and how they are scaled.

    Attributes:
        size: values of each head that are rotated, 2R.
        scaling: the kind's own numbers, under HF's names.
        sections: M-RoPE: how many of the R frequencies follow each position axis, in order.
        interleaved: the frequencies take turns at the axes, until an axis has had its share; the first takes the rest.
    """

    size: int
    theta: float
    kind: str = "default"
    scaling: Mapping[str, Any]
    max_position: int
    original_max_position: int
    sections: tuple[int, ...] | None = None
    interleaved: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, head_dim: int, max_position: int) -> RopeConfig:
        """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4).

        Raises:
            UnsupportedModelError: a kind that is not implemented, or one with its numbers missing.
        """
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        old_kind = scaling.pop("type", None)
        kind = scaling.pop("rope_type", None) or old_kind or "default"
        kind = _ALIASES.get(kind, kind)
        if kind not in KINDS:
            raise UnsupportedModelError(f"rope_type is {kind!r}; implemented are {', '.join(KINDS)}.")
        theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
        partial = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
        sections, interleaved = scaling.pop("mrope_section", None), scaling.pop("mrope_interleaved", None)
        original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        missing = [name for name in _REQUIRED[kind] if scaling.get(name) is None]
        if missing:
            raise UnsupportedModelError(f"rope_type {kind!r} lacks {', '.join(missing)}; the config has {scaling}.")
        return cls(
            size=int(head_dim * partial),
            theta=float(theta),
            kind=kind,
            scaling=scaling,
            max_position=max_position,
            original_max_position=original or max_position,
            sections=None if sections is None else tuple(sections),
            interleaved=bool(interleaved),
        )


_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def inverse_frequencies(config: RopeConfig, context_len: int) -> tuple[torch.Tensor, float]:
    """The R inverse frequencies in float32, and the factor on cos and sin.

    Args:
        context_len: the longest sequence that will be run. LongRoPE takes its long factors when this exceeds the
            original context, once for all requests, so that a request's result depends on no other one's length.
    """
    exponents_R = torch.arange(0, config.size, 2, dtype=torch.float32) / config.size
    base_R = config.theta**exponents_R
    scaling = config.scaling
    if config.kind == "linear":
        return 1.0 / base_R / scaling["factor"], 1.0
    if config.kind == "llama3":
        return _llama3(1.0 / base_R, scaling, config.original_max_position), 1.0
    if config.kind == "yarn":
        return _yarn(base_R, config)
    if config.kind == "longrope":
        is_long = context_len > config.original_max_position
        factors_R = torch.tensor(scaling["long_factor" if is_long else "short_factor"], dtype=torch.float32)
        if factors_R.shape != base_R.shape:
            raise UnsupportedModelError(f"longrope has {len(factors_R)} factors; expected {len(base_R)}.")
        if is_long:
            logger.info(
                "LongRoPE takes its long factors for all sequences, since they may have %s tokens; with "
                "max_model_len=%s it takes the short ones.",
                context_len,
                config.original_max_position,
            )
        return 1.0 / (factors_R * base_R), _longrope_factor(config)
    return 1.0 / base_R, 1.0


def _llama3(inverse_R: torch.Tensor, scaling: Mapping[str, Any], original: int) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended. Source: Llama 3.1's reference code."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    turns_R = original * inverse_R / (2 * math.pi)  # rotations within the original context
    keep_R = ((turns_R - low) / (high - low)).clamp(0.0, 1.0)
    return inverse_R * (keep_R + (1 - keep_R) / factor)


def _yarn(base_R: torch.Tensor, config: RopeConfig) -> tuple[torch.Tensor, float]:
    """arXiv:2309.00071."""
    scaling, factor = config.scaling, config.scaling["factor"]

    def dimension(rotations: float) -> float:
        ratio = config.original_max_position / (rotations * 2 * math.pi)
        return config.size * math.log(ratio) / (2 * math.log(config.theta))

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.size - 1)
    if low == high:
        high += 0.001
    stretch_R = ((torch.arange(len(base_R), dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    inverse_R = stretch_R / (factor * base_R) + (1 - stretch_R) / base_R
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all)
        else:
            attention_factor = _yarn_scale(factor, 1.0)
    return inverse_R, float(attention_factor)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_factor(config: RopeConfig) -> float:
    """arXiv:2402.13753, as Phi-3 uses it."""
    given = config.scaling.get("attention_factor")
    if given is not None:
        return float(given)
    factor = config.scaling.get("factor") or config.max_position / config.original_max_position
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(config.original_max_position))


class Rope(nn.Module):
    """Positions to cos and sin, once per step for all layers."""

    inverse_R: torch.Tensor
    axis_R: torch.Tensor | None

    def __init__(self, config: RopeConfig, context_len: int, device: torch.device) -> None:
        super().__init__()
        inverse_R, self.factor = inverse_frequencies(config, context_len)
        self.register_buffer("inverse_R", inverse_R.to(device), persistent=False)
        axis_R = None
        if config.sections is not None:
            axis_R = axis_of_frequency(config.sections, len(inverse_R), interleaved=config.interleaved).to(device)
        self.register_buffer("axis_R", axis_R, persistent=False)

    def forward(self, positions_AT: torch.Tensor) -> Rotary:
        if self.axis_R is None:
            positions_TR = positions_AT[0].unsqueeze(1)
        else:
            positions_TR = positions_AT.transpose(0, 1).index_select(1, self.axis_R)
        angles_TR = positions_TR * self.inverse_R
        cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
        return Rotary(cos_TR, sin_TR) if self.factor == 1.0 else Rotary(cos_TR * self.factor, sin_TR * self.factor)


def axis_of_frequency(sections: Sequence[int], num_frequencies: int, *, interleaved: bool = False) -> torch.Tensor:
    """int64 (R,): which position axis each frequency follows. Source: Qwen2-VL, arXiv:2409.12191; interleaved,
    Qwen3-VL, arXiv:2511.21631."""
    if sum(sections) != num_frequencies:
        raise UnsupportedModelError(f"mrope_section {tuple(sections)} must sum to {num_frequencies} frequencies.")
    if not interleaved:
        return torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections))
    axis_R = torch.zeros(num_frequencies, dtype=torch.int64)
    for axis, share in list(enumerate(sections))[1:]:
        axis_R[axis : len(sections) * share : len(sections)] = axis
    return axis_R
