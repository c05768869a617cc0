"""Qwen3-VL, arXiv:2511.21631 (HF ``Qwen3VLForConditionalGeneration``, dense): Qwen2-VL's tower with learned positions
as well, features for the decoder's first layers, and Qwen3 with M-RoPE whose axes take turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from opsin.errors import UnsupportedModelError
from opsin.layers import Placement
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.qwen2_vl.model import Qwen2VLModel
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.qwen_vit import QwenTower, QwenViTConfig


class Qwen3VLModel(Qwen2VLModel):
    """A feature has the decoder's width once for its input, and once for each of its first layers."""

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        strict = StrictConfig(config, "config.json")
        text: dict[str, Any] = dict(strict.require("text_config"))
        text["tie_word_embeddings"] = bool(strict.take("tie_word_embeddings", False))
        text["rope_parameters"] = _rope(text)
        decoder_config = DecoderConfig.from_hf({"model_type": "qwen3_vl_text", **text})
        tower_config = QwenViTConfig.from_qwen3_vl(StrictConfig(strict.require("vision_config"), "vision_config"))
        tower_config.check_width(decoder_config.hidden_size)
        if len(tower_config.deep_layers) > len(decoder_config.layers):
            raise UnsupportedModelError(
                f"deepstack_visual_indexes has {len(tower_config.deep_layers)} entries for a decoder of "
                f"{len(decoder_config.layers)} layers."
            )
        strict.skip("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        strict.finish()
        decoder = Decoder(place, decoder_config, max_model_len)
        return cls("Qwen3VLForConditionalGeneration", QwenTower(place, tower_config, norm), decoder)


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """The text config's rope, whose axes take turns whether it says so or not."""
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not given.get("mrope_interleaved", True):
        raise UnsupportedModelError("mrope_interleaved is false; Qwen3-VL's M-RoPE is interleaved.")
    theta = {"rope_theta": text.get("rope_theta") or 500000.0}
    return {"mrope_section": [24, 20, 20], **theta, **given, "mrope_interleaved": True}
