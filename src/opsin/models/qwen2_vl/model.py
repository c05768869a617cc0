"""Qwen2-VL, arXiv:2409.12191, and Qwen2.5-VL, arXiv:2502.13923 (HF ``Qwen2VLForConditionalGeneration`` and
``Qwen2_5_VLForConditionalGeneration``): a tower that merges its own patches, and Qwen2 with M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from opsin.layers import Placement
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.picture_model import PictureModel
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig, text_settings
from opsin.models.towers.qwen_vit import RENAMES as TOWER_RENAMES
from opsin.models.towers.qwen_vit import MergingTower, QwenTower, QwenViTConfig
from opsin.types import MediaLayout

_ARCHITECTURES = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", QwenViTConfig.from_qwen2_vl),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", QwenViTConfig.from_qwen2_5_vl),
}
_TEXT_DEFAULTS = {  # Qwen2VLTextConfig's and Qwen2_5_VLTextConfig's
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}
_OUTER_KEYS = (  # of config.json; transformers 4.5x wrote the tokens into text_config too
    "vision_config",
    "text_config",
    "image_token_id",
    "video_token_id",
    "vision_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)


class Qwen2VLModel(PictureModel):
    """One picture is one tile of its own size; two frames of a video are one, too."""

    # Hub checkpoints (``visual.``, ``model.``), transformers 5 (``model.visual.``, ``model.language_model.``).
    renames = (
        (r"^(model\.)?visual\.", "tower."),
        (r"^model\.(language_model\.)?", "decoder."),
        (r"^lm_head\.", "decoder.lm_head."),
        *TOWER_RENAMES,
    )

    def __init__(self, architecture: str, tower: MergingTower, decoder: Decoder) -> None:
        deep = len(tower.config.deep_layers)
        super().__init__(architecture, decoder, num_position_axes=3, num_deep_layers=deep)
        self.tower = tower

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        model_type = StrictConfig(config, "config.json").choose("model_type", tuple(_ARCHITECTURES), "qwen2_vl")
        architecture, read_tower = _ARCHITECTURES[model_type]
        decoder_config = DecoderConfig.from_hf(_text_config(config))
        tower_config = read_tower(StrictConfig(config.get("vision_config") or {}, "vision_config"))
        tower_config.check_width(decoder_config.hidden_size)
        return cls(architecture, QwenTower(place, tower_config, norm), Decoder(place, decoder_config, max_model_len))

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """(sum of num_features, D), all pictures in as few passes as can be."""
        return self.tower.in_passes(tiles, [layout.numbers[0] for layout in layouts])


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings, as a Qwen2 config."""
    return {**_TEXT_DEFAULTS, **text_settings(config, _OUTER_KEYS, [16, 24, 24]), "model_type": "qwen2"}
