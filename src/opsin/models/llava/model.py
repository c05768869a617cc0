"""LLaVA-1.5, arXiv:2310.03744 (HF ``LlavaForConditionalGeneration``): tower, two-layer projector, decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from opsin.errors import UnsupportedModelError
from opsin.kernels.reference import ACTIVATIONS
from opsin.layers import Placement
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.projector import Projector
from opsin.models.rule import PixelNorm
from opsin.models.square_tower import CLIP_LARGE_336
from opsin.models.strict import StrictConfig
from opsin.models.tile_model import TileModel
from opsin.models.towers.clip import ClipTower
from opsin.models.towers.siglip import SiglipTower

_TOWERS: dict[str, type[ClipTower] | type[SiglipTower]] = {
    "clip_vision_model": ClipTower,
    "siglip_vision_model": SiglipTower,
}


class LlavaModel(TileModel):
    """One picture is one tile."""

    architecture: ClassVar[str] = "LlavaForConditionalGeneration"

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        strict = StrictConfig(config, "config.json")
        vision_config = strict.take("vision_config") or CLIP_LARGE_336
        text_config: dict[str, Any] = dict(strict.take("text_config", {}))
        if strict.take("tie_word_embeddings", False):
            text_config["tie_word_embeddings"] = True
        tower_type = vision_config.get("model_type", "clip_vision_model")
        if tower_type not in _TOWERS:
            raise UnsupportedModelError(
                f"vision_config.model_type is {tower_type!r}; implemented are {', '.join(sorted(_TOWERS))}."
            )
        tower_class = _TOWERS[tower_type]
        tower_config = tower_class.read_config(vision_config, strict.take("vision_feature_layer", -2))
        strategy = strict.choose("vision_feature_select_strategy", ("default", "full"), "default")
        decoder_config = DecoderConfig.from_hf(text_config)
        projector = Projector(
            place,
            tower_config.hidden_size * len(tower_config.select),
            decoder_config.hidden_size,
            strict.choose("projector_hidden_act", tuple(ACTIVATIONS), "gelu"),
            bias=strict.take("multimodal_projector_bias", True),
        )
        strict.skip("image_token_index", "image_token_id", "image_seq_length", "ignore_index", "vocab_size")
        strict.finish()
        return cls(
            place,
            tower_class(place, tower_config),
            projector,
            Decoder(place, decoder_config, max_model_len),
            norm,
            drop_first=strategy == "default",
        )
