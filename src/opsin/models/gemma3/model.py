"""Gemma 3, arXiv:2503.19786 (HF ``Gemma3ForConditionalGeneration``): SigLIP, averaged down, Gemma 3's decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from opsin.errors import UnsupportedModelError
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.layers.norm import RMSNorm, normed
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.picture_model import RENAMES
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.tile_model import TileModel
from opsin.models.towers.siglip import SiglipTower
from opsin.models.towers.vit import ViTConfig

_RENAMES = (
    *RENAMES,
    (r"^projector\.mm_input_projection_weight$", "projector.mm_input_projection.weight"),
)


class Gemma3Model(TileModel):
    """A picture is as many tiles as its plan makes, each encoded by itself."""

    architecture: ClassVar[str] = "Gemma3ForConditionalGeneration"
    renames = _RENAMES

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        strict = StrictConfig(config, "config.json")
        text = {**strict.require("text_config"), "tie_word_embeddings": strict.take("tie_word_embeddings", True)}
        tower_config = SiglipTower.read_config(strict.require("vision_config"), -1)
        decoder_config = DecoderConfig.from_hf(text)
        num_features = strict.take("mm_tokens_per_image", 256)
        strict.skip("boi_token_index", "eoi_token_index", "image_token_index")
        strict.skip("boi_token_id", "eoi_token_id", "image_token_id")
        strict.finish()
        return cls(
            place,
            SiglipTower(place, tower_config, norms_last=True),
            Gemma3Projector(place, tower_config, num_features, decoder_config.hidden_size),
            Decoder(place, decoder_config, max_model_len),
            norm,
        )

    def forward(
        self,
        hidden_TD: torch.Tensor,
        positions_AT: torch.Tensor,
        attention: AttentionInputs,
        caches: Sequence[LayerCache],
        extra_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, D) after the final norm. A window cuts a picture's view of itself, too."""
        attention = dataclasses.replace(attention, visible_begin_T=None)
        return super().forward(hidden_TD, positions_AT, attention, caches, extra_TE)


class Gemma3Projector(nn.Module):
    """The mean of each square block of patches, normed, to the decoder's width."""

    def __init__(self, place: Placement, tower: ViTConfig, num_features: int, hidden_size: int) -> None:
        super().__init__()
        edge, features = tower.image_size // tower.patch_size, math.isqrt(num_features)
        if features**2 != num_features or edge % features:
            raise UnsupportedModelError(
                f"mm_tokens_per_image is {num_features}; it must be the square of a divisor of {edge}, the tower's "
                "patches along a side."
            )
        self.block = (features, edge // features)
        self.mm_soft_emb_norm = RMSNorm(place, tower.hidden_size, tower.norm_eps, from_one=True)
        self.mm_input_projection = TransposedLinear(place, tower.hidden_size, hidden_size)

    def forward(self, hidden_BPD: torch.Tensor) -> torch.Tensor:
        pooled_BYXD = hidden_BPD.unflatten(1, (*self.block, *self.block)).mean((2, 4))
        features_MD = self.mm_input_projection(normed(self.mm_soft_emb_norm, pooled_BYXD.flatten(0, 2)))
        return features_MD.unflatten(0, (len(hidden_BPD), -1))


class TransposedLinear(Linear):
    """One whose checkpoints hold the weight as (in, out)."""

    def __init__(self, place: Placement, in_features: int, out_features: int) -> None:
        super().__init__(place, in_features, out_features, bias=False, checkpoint_shape=(in_features, out_features))

    def pack(self) -> None:
        assert self.checkpoint_shape is not None
        self.weight = nn.Parameter(self.weight.view(self.checkpoint_shape).t().contiguous(), requires_grad=False)
        super().pack()
