"""InternViT, arXiv:2312.14238 (HF ``InternVLVisionModel``): layer scale, and norms of queries and keys where wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opsin.errors import UnsupportedModelError
from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.layers.mlp import MLP
from opsin.layers.norm import LayerNorm, RMSNorm
from opsin.layers.rope import Rotary
from opsin.models.strict import StrictConfig
from opsin.models.towers.attention import PatchAttention, Segments
from opsin.models.towers.vit import ViTConfig, ViTEncoder

_QK_NORM_EPS = 1e-6
_DEFAULTS: dict[str, Any] = {  # InternVLVisionConfig's
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InternViTConfig:
    """What InternViT adds to the common shape.

    Attributes:
        qk_norm: queries and keys are normalised, all heads as one vector.
        rms_norm: of the blocks, in place of a layer norm.
        has_positions: a learned vector is added to every row.
        final_norm: the last hidden state is the one selected, and normalised.
        unused_weights: patterns of checkpoint tensors that these settings leave out.
    """

    vit: ViTConfig
    qkv_bias: bool
    qk_norm: bool
    rms_norm: bool
    has_positions: bool
    final_norm: bool
    unused_weights: tuple[str, ...]

    @classmethod
    def from_hf(cls, vision_config: Mapping[str, Any], select: int) -> InternViTConfig:
        """Read a vision config; ``select`` is HF's ``vision_feature_layer``.

        Raises:
            UnsupportedModelError: an unknown key or value.
        """
        given = {key: value for key, value in vision_config.items() if value is not None}
        config = StrictConfig(_DEFAULTS | given, "vision_config")
        vit = ViTConfig.from_hf(config, select, defaults=_DEFAULTS)
        if vit.hidden_size % vit.num_heads:
            raise UnsupportedModelError(
                f"vision_config.hidden_size is {vit.hidden_size}, which {vit.num_heads} heads do not divide."
            )
        has_final_norm = not config.take("use_mean_pooling", True)
        # Hugging Face normalises what it calls the last hidden state, which is layer -1 by that name alone.
        final_norm = has_final_norm and select == -1
        built, num_layers = max(vit.select), config.take("num_hidden_layers")
        unused = [rf"encoder\.layers\.{number}\..*" for number in range(built, num_layers)]
        if has_final_norm and not final_norm:
            unused.append(r"layernorm\..*")
        if config.take("use_mask_token", False):  # of the pretraining by masked patches
            unused.append(r"embeddings\.mask_token")
        result = cls(
            vit=vit,
            qkv_bias=config.take("attention_bias", False),
            qk_norm=config.take("use_qk_norm", False),
            rms_norm=config.choose("norm_type", ("layer_norm", "rms_norm"), "layer_norm") == "rms_norm",
            has_positions=config.take("use_absolute_position_embeddings", True),
            final_norm=final_norm,
            unused_weights=tuple(unused),
        )
        config.skip("hidden_dropout_prob", "projection_dropout", "layer_scale_init_value", "initializer_factor")
        config.finish()
        return result


class InternViTTower(nn.Module):
    """Patches to hidden states, the class token first."""

    def __init__(self, place: Placement, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config.vit
        self.unused_weights = config.unused_weights
        self.embeddings = InternViTEmbeddings(place, config)
        self.encoder = ViTEncoder(place, config.vit, lambda: InternViTBlock(place, config))
        self.layernorm = LayerNorm(place, config.vit.hidden_size, config.vit.norm_eps) if config.final_norm else None

    def forward(self, patches_BPC: torch.Tensor) -> torch.Tensor:
        """(tiles, patches, 3 * patch_size**2) to (tiles, 1 + patches, D)."""
        hidden_BPD = self.encoder(self.embeddings(patches_BPC))
        return hidden_BPD if self.layernorm is None else self.layernorm(hidden_BPD)


class InternViTEmbeddings(nn.Module):
    def __init__(self, place: Placement, config: InternViTConfig) -> None:
        super().__init__()
        size, width = config.vit.patch_size, config.vit.hidden_size
        self.patch_embedding = Linear(place, 3 * size * size, width, bias=True, checkpoint_shape=(width, 3, size, size))
        self.cls_token = place.parameter(1, 1, width)
        self.position_embeddings = (
            place.parameter(1, config.vit.num_patches + 1, width) if config.has_positions else None
        )

    def forward(self, patches_BPC: torch.Tensor) -> torch.Tensor:
        patches_BPD = self.patch_embedding(patches_BPC)
        rows_BPD = torch.cat([self.cls_token.expand(len(patches_BPD), -1, -1), patches_BPD], dim=1)
        return rows_BPD if self.position_embeddings is None else rows_BPD + self.position_embeddings


class InternViTBlock(nn.Module):
    """Pre-norm; what attention and MLP add is scaled per channel (arXiv:2103.17239)."""

    def __init__(self, place: Placement, config: InternViTConfig) -> None:
        super().__init__()
        vit = config.vit
        norm = RMSNorm if config.rms_norm else LayerNorm
        self.layernorm_before = norm(place, vit.hidden_size, vit.norm_eps)
        qk_norm = (lambda: RMSNorm(place, vit.hidden_size, _QK_NORM_EPS)) if config.qk_norm else None
        self.attention = PatchAttention(place, vit.hidden_size, vit.num_heads, qkv_bias=config.qkv_bias, norm=qk_norm)
        self.lambda_1 = place.parameter(vit.hidden_size)
        self.layernorm_after = norm(place, vit.hidden_size, vit.norm_eps)
        self.mlp = MLP(place, vit.hidden_size, vit.intermediate_size, vit.hidden_act)
        self.lambda_2 = place.parameter(vit.hidden_size)

    def forward(self, x_PD: torch.Tensor, segments: Segments, rotary: Rotary | None) -> torch.Tensor:
        seen_PD, _ = self.attention(self.layernorm_before, x_PD, None, segments, rotary)
        x_PD = torch.addcmul(x_PD, self.lambda_1, seen_PD)
        return torch.addcmul(x_PD, self.lambda_2, self.mlp.normed(self.layernorm_after, x_PD, None)[0])
