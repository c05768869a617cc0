"""The pre-norm vision transformer that CLIP and SigLIP share, run on many tiles at once; InternViT has its own blocks.

Tiles of the size that a tower was trained for are one dense batch; pictures of unlike sizes run one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from opsin.errors import UnsupportedModelError
from opsin.kernels.reference import ACTIVATIONS
from opsin.layers import Placement
from opsin.layers.mlp import MLP
from opsin.layers.norm import LayerNorm
from opsin.layers.rope import Rotary
from opsin.models.strict import StrictConfig
from opsin.models.towers import trunk
from opsin.models.towers.attention import PatchAttention, Segments


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """Shape of the tower. ``select``: the hidden states to return, counted from 0 (the embeddings)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    norm_eps: float
    select: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: StrictConfig, select: int | Sequence[int], *, defaults: Mapping[str, Any]) -> ViTConfig:
        """Read what all these towers name alike; the caller reads the rest, then calls ``config.finish()``.

        Args:
            select: HF's ``vision_feature_layer``: one or several, negative counts from the end.

        Raises:
            UnsupportedModelError: values that are not implemented, or a layer that the tower does not have.
        """
        num_layers = config.take("num_hidden_layers", 12)
        config.choose("num_channels", (3,), 3)
        return cls(
            hidden_size=config.take("hidden_size", 768),
            intermediate_size=config.take("intermediate_size", 3072),
            num_layers=num_layers,
            num_heads=config.take("num_attention_heads", 12),
            image_size=_square(config.take("image_size", defaults["image_size"]), "image_size"),
            patch_size=_square(config.take("patch_size", defaults["patch_size"]), "patch_size"),
            hidden_act=config.choose("hidden_act", tuple(ACTIVATIONS), defaults["hidden_act"]),
            norm_eps=config.take("layer_norm_eps", defaults["layer_norm_eps"]),
            select=hidden_state_indices(select, num_layers),
        )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def hidden_state_indices(select: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """HF's feature layers as indices into the ``num_layers + 1`` hidden states, the embeddings being number 0."""
    wanted = (select,) if isinstance(select, int) else tuple(select)
    for index in wanted:
        if not -(num_layers + 1) <= index <= num_layers:
            raise UnsupportedModelError(
                f"vision_feature_layer {index} does not exist: the tower has {num_layers} layers."
            )
    return tuple(index % (num_layers + 1) for index in wanted)


def _square(size: int | Sequence[int], name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UnsupportedModelError(f"vision_config.{name} is {size}; only squares are implemented.")
    return sides.pop()


class PositionEmbedding(nn.Module):
    """A learned vector per row, the class token's included."""

    def __init__(self, place: Placement, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = place.parameter(num_rows, hidden_size)

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        return x_BPD + self.weight


class ViTBlock(nn.Module):
    def __init__(self, place: Placement, config: ViTConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(place, config.hidden_size, config.norm_eps)
        self.self_attn = PatchAttention(place, config.hidden_size, config.num_heads)
        self.layer_norm2 = LayerNorm(place, config.hidden_size, config.norm_eps)
        self.mlp = MLP(place, config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x_PD: torch.Tensor, segments: Segments, rotary: Rotary | None) -> torch.Tensor:
        seen_PD, _ = self.self_attn(self.layer_norm1, x_PD, None, segments, rotary)
        added_PD, x_PD = self.mlp.normed(self.layer_norm2, seen_PD, x_PD)
        return x_PD + added_PD


class ViTEncoder(nn.Module):
    """The blocks up to the last one whose output is wanted; the rest of the checkpoint is never loaded.

    Args:
        block: makes one, called as a ``ViTBlock`` is, where the tower has its own.
        rotate: of towers whose positions are rotary: places (P, 2) to what turns their patches.
    """

    def __init__(
        self,
        place: Placement,
        config: ViTConfig,
        block: Callable[[], nn.Module] | None = None,
        rotate: Callable[[torch.Tensor], Rotary] | None = None,
    ) -> None:
        super().__init__()
        self.select = config.select
        self.rotate = rotate
        make = block or (lambda: ViTBlock(place, config))
        self.layers = nn.ModuleList(make() for _ in range(max(config.select)))

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        """The selected hidden states side by side, in the order selected: (B, P, selected * D)."""
        num_tiles, length, _ = x_BPD.shape
        return self.packed(x_BPD.flatten(0, 1), (length,) * num_tiles).unflatten(0, (num_tiles, length))

    def packed(self, x_PD: torch.Tensor, seq_lens: Sequence[int], places_P2: np.ndarray | None = None) -> torch.Tensor:
        """The same for pictures of unlike lengths, one after the other: (P, selected * D).

        Args:
            places_P2: what ``rotate`` takes.
        """
        return trunk.run(self._trunk, x_PD, [seq_lens], [] if places_P2 is None else [places_P2])

    def _trunk(self, x_PD: torch.Tensor, segments: Sequence[Segments], numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        rotary = None if self.rotate is None else self.rotate(*numbers)
        states = {0: x_PD}
        for number, layer in enumerate(self.layers, start=1):
            x_PD = layer(x_PD, segments[0], rotary)
            if number in self.select:
                states[number] = x_PD
        wanted = [states[number] for number in self.select]
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted, dim=-1)
