"""SigLIP's vision tower, arXiv:2303.15343 (HF ``SiglipVisionModel``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.layers.norm import LayerNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.vit import PositionEmbedding, ViTConfig, ViTEncoder

_DEFAULTS = {"image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


class SiglipTower(nn.Module):
    """Patches to hidden states; no class token.

    HF applies ``post_layernorm`` to the last hidden state alone, after the ones that feature layers select from, and
    the attention-pooling ``head`` after that; the head is not built.

    Args:
        norms_last: build ``post_layernorm``, for families that take the last hidden state.
    """

    num_prefix_tokens = 0
    unused_weights = (
        r"encoder\.layers\.\d+\..*",
        r"post_layernorm\..*",
        r"head\..*",
        r"embeddings\.position_ids",
    )

    def __init__(self, place: Placement, config: ViTConfig, *, norms_last: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embeddings = SiglipEmbeddings(place, config)
        self.encoder = ViTEncoder(place, config)
        self.post_layernorm = LayerNorm(place, config.hidden_size, config.norm_eps) if norms_last else None

    @staticmethod
    def read_config(vision_config: Mapping[str, Any], select: int | Sequence[int]) -> ViTConfig:
        """Raises UnsupportedModelError: an unknown key or value."""
        config = StrictConfig(vision_config, "vision_config")
        result = ViTConfig.from_hf(config, select, defaults=_DEFAULTS)
        config.skip("vision_use_head")
        config.finish()
        return result

    def forward(self, patches_BPC: torch.Tensor) -> torch.Tensor:
        """(tiles, patches, 3 * patch_size**2) to (tiles, patches, selected * D)."""
        hidden_BPD = self.encoder(self.embeddings(patches_BPC))
        return hidden_BPD if self.post_layernorm is None else self.post_layernorm(hidden_BPD)


class SiglipEmbeddings(nn.Module):
    def __init__(self, place: Placement, config: ViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.patch_embedding = Linear(
            place, 3 * size * size, config.hidden_size, bias=True, checkpoint_shape=(config.hidden_size, 3, size, size)
        )
        self.position_embedding = PositionEmbedding(place, config.num_patches, config.hidden_size)

    def forward(self, patches_BPC: torch.Tensor) -> torch.Tensor:
        return self.position_embedding(self.patch_embedding(patches_BPC))
