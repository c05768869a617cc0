"""Pixtral's vision tower, arXiv:2410.07073 (HF ``PixtralVisionModel``): pictures of any size, packed, with rotary
positions in two axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opsin.errors import UnsupportedModelError
from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.layers.mlp import GatedMLP
from opsin.layers.norm import RMSNorm, normed
from opsin.layers.rope import Rotary
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.attention import PatchAttention, Segments
from opsin.models.towers.packing import pack
from opsin.models.towers.patches import Patches, cut_blocks
from opsin.models.towers.vit import ViTConfig, ViTEncoder

_NORM_EPS = 1e-5
_DEFAULTS: dict[str, Any] = {  # PixtralVisionConfig's
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 1024,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": _NORM_EPS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PixtralConfig:
    """Shape of the tower; the image size of ``vit`` limits nothing here."""

    vit: ViTConfig
    rope_theta: float

    @classmethod
    def from_hf(cls, vision_config: Mapping[str, Any], select: int | Sequence[int]) -> PixtralConfig:
        """Read a vision config; ``select`` is HF's ``vision_feature_layer``.

        Raises:
            UnsupportedModelError: an unknown key or value.
        """
        config = StrictConfig({**_DEFAULTS, **vision_config}, "vision_config")
        vit = ViTConfig.from_hf(config, select, defaults=_DEFAULTS)
        config.choose("head_dim", (vit.hidden_size // vit.num_heads,), vit.hidden_size // vit.num_heads)
        if vit.hidden_size % (4 * vit.num_heads):
            raise UnsupportedModelError(
                f"The vision tower has {vit.num_heads} heads over {vit.hidden_size} values; heads must be multiples "
                "of 4 wide."
            )
        rope = config.take("rope_parameters", {})
        if rope.get("rope_type", "axial") != "axial" or set(rope) - {"rope_type", "rope_theta"}:
            raise UnsupportedModelError(f"vision_config.rope_parameters is {rope}; only plain 'axial' is implemented.")
        theta = rope.get("rope_theta") or config.take("rope_theta", 10000.0)
        config.skip("rope_theta", "tie_word_embeddings", "vocab_size")
        config.finish()
        return cls(vit=vit, rope_theta=float(theta))


class PixtralTower(nn.Module):
    """uint8 pictures to hidden states.

    Patches run in merge order: the ``merge`` x ``merge`` patches that become one feature are neighbours.
    """

    unused_weights = (r"transformer\.layers\.\d+\..*",)  # layers behind the last that is selected

    def __init__(self, place: Placement, config: PixtralConfig, norm: PixelNorm, merge: int) -> None:
        super().__init__()
        vit = config.vit
        size, width = vit.patch_size, vit.hidden_size
        self.config = config
        self.merge = merge
        self.patches = Patches(place, size, norm)
        self.patch_conv = Linear(place, 3 * size**2, width, bias=False, checkpoint_shape=(width, 3, size, size))
        self.ln_pre = RMSNorm(place, width, _NORM_EPS)
        self.transformer = ViTEncoder(place, vit, lambda: PixtralBlock(place, vit), self._rotary)
        head_dim = width // vit.num_heads
        inverse_R = 1.0 / config.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        # The first half of each head's pairs turns with the row, the second with the column.
        self.inverse_2R = torch.stack([inverse_R[0::2], inverse_R[1::2]]).to(place.device)

    def forward(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """(height, width, 3) each, sides in whole features, to (patches, selected * D), one after the other."""
        patch = self.config.vit.patch_size
        grids = [(picture.shape[0] // patch, picture.shape[1] // patch) for picture in pictures]
        packing = pack(grids, self.merge, None)
        blocks_MYX3 = torch.cat([cut_blocks(picture, patch * self.merge) for picture in pictures])
        x_PD = normed(self.ln_pre, self.patch_conv(self.patches(blocks_MYX3).flatten(0, 1)))
        return self.transformer.packed(x_PD, packing.full_lens, packing.positions_P2)

    def _rotary(self, positions_P2: torch.Tensor) -> Rotary:
        angles_PR = (positions_P2.unsqueeze(-1) * self.inverse_2R).flatten(1)
        return Rotary(angles_PR.cos(), angles_PR.sin())


class PixtralBlock(nn.Module):
    def __init__(self, place: Placement, config: ViTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(place, config.hidden_size, config.norm_eps)
        self.attention = PatchAttention(place, config.hidden_size, config.num_heads, qkv_bias=False, output_bias=False)
        self.ffn_norm = RMSNorm(place, config.hidden_size, config.norm_eps)
        self.feed_forward = GatedMLP(place, config.hidden_size, config.intermediate_size, config.hidden_act, bias=False)

    def forward(self, x_PD: torch.Tensor, segments: Segments, rotary: Rotary | None) -> torch.Tensor:
        seen_PD, _ = self.attention(self.attention_norm, x_PD, None, segments, rotary)
        added_PD, x_PD = self.feed_forward.normed(self.ffn_norm, seen_PD, x_PD)
        return x_PD + added_PD
