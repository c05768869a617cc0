"""CLIP's vision tower, arXiv:2103.00020 (HF ``CLIPVisionModel``)."""

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

_DEFAULTS = {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


class ClipTower(nn.Module):
    """Patches to hidden states, the class token first.

    HF's final ``post_layernorm`` belongs to the pooled output, so it is not built.
    """

    num_prefix_tokens = 1
    unused_weights = (r"encoder\.layers\.\d+\..*", r"post_layernorm\..*", r"embeddings\.position_ids")

    def __init__(self, place: Placement, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ClipEmbeddings(place, config)
        self.pre_layrnorm = LayerNorm(place, config.hidden_size, config.norm_eps)  # HF's spelling
        self.encoder = ViTEncoder(place, config)

    @staticmethod
    def read_config(vision_config: Mapping[str, Any], select: int | Sequence[int]) -> ViTConfig:
        """Raises UnsupportedModelError: an unknown key or value."""
        config = StrictConfig(vision_config, "vision_config")
        result = ViTConfig.from_hf(config, select, defaults=_DEFAULTS)
        config.skip("vocab_size")  # LLaVA-1.5's vision_config carries the text tower's
        config.finish()
        return result

    def forward(self, patches_BPC: torch.Tensor) -> torch.Tensor:
        """(tiles, patches, 3 * patch_size**2) to (tiles, 1 + patches, selected * D)."""
        return self.encoder(self.pre_layrnorm(self.embeddings(patches_BPC)))


class ClipEmbeddings(nn.Module):
    def __init__(self, place: Placement, config: ViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.class_embedding = place.parameter(config.hidden_size)
        self.patch_embedding = Linear(
            place,
            3 * size * size,
            config.hidden_size,
            bias=False,
            checkpoint_shape=(config.hidden_size, 3, size, size),
        )
        self.position_embedding = PositionEmbedding(place, config.num_patches + 1, config.hidden_size)

    def forward(self, patches_BPC: torch.Tensor) -> torch.Tensor:
        patches_BPD = self.patch_embedding(patches_BPC)
        class_B1D = self.class_embedding.expand(len(patches_BPD), 1, -1)
        return self.position_embedding(torch.cat([class_B1D, patches_BPD], dim=1))
