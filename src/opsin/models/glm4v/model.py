"""GLM-4.1V, arXiv:2507.01006, and GLM-4.6V-Flash (HF ``Glm4vForConditionalGeneration`` and
``Glm46VForConditionalGeneration``, dense): one network under two names. A tower that merges its own patches, and GLM-4
with M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from opsin.layers import Placement
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.qwen2_vl.model import Qwen2VLModel
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig, text_settings
from opsin.models.towers.glm_vit import RENAMES as TOWER_RENAMES
from opsin.models.towers.glm_vit import GlmTower
from opsin.models.towers.qwen_vit import QwenViTConfig

_ARCHITECTURES = {"glm4v": "Glm4vForConditionalGeneration", "glm46v": "Glm46VForConditionalGeneration"}
_OUTER_KEYS = (  # of config.json; checkpoints have some of the tokens in text_config too
    "vision_config",
    "text_config",
    *(f"{kind}{end}_token_id" for kind in ("image", "video") for end in ("", "_start", "_end")),
)


class Glm4vModel(Qwen2VLModel):
    """One picture is one tile of its own size; two frames of a video are one, too."""

    renames = (
        (r"^(model\.)?visual\.", "tower."),
        (r"^model\.(language_model\.)?", "decoder."),
        (r"^lm_head\.", "decoder.lm_head."),
        *TOWER_RENAMES,
        # The norm ahead of the MLP has the name that Gemma's, and ours, has behind attention.
        (r"^(decoder\.layers\.\d+\.)post_attention_layernorm\.", r"\1pre_feedforward_layernorm."),
        (r"^(decoder\.layers\.\d+\.)post_self_attn_layernorm\.", r"\1post_attention_layernorm."),
        (r"^(decoder\.layers\.\d+\.)post_mlp_layernorm\.", r"\1post_feedforward_layernorm."),
    )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        model_type = StrictConfig(config, "config.json").choose("model_type", tuple(_ARCHITECTURES), "glm4v")
        nested = StrictConfig(config.get("text_config") or {}, "text_config")
        nested.choose("model_type", ("glm4v_text",), "glm4v_text")  # a mixture of experts has another
        text = text_settings(config, _OUTER_KEYS, [8, 12, 12])
        decoder_config = DecoderConfig.from_hf({**text, "model_type": "glm4v_text"})
        tower_config = QwenViTConfig.from_glm4v(StrictConfig(config.get("vision_config") or {}, "vision_config"))
        tower_config.check_width(decoder_config.hidden_size)
        decoder = Decoder(place, decoder_config, max_model_len)
        return cls(_ARCHITECTURES[model_type], GlmTower(place, tower_config, norm), decoder)
