"""MiniCPM-V 2.6, arXiv:2408.01800 (the ``MiniCPMV`` of openbmb/MiniCPM-V-2_6): SigLIP, resampler, Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from opsin.errors import UnsupportedModelError
from opsin.layers import Placement
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.packed_model import PackedModel
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.resampler import HEAD_DIM, Resampler
from opsin.models.towers.siglip_navit import SiglipNavitTower
from opsin.models.towers.vit import ViTConfig

_VERSION = "2.6"
_VISION: Mapping[str, Any] = {  # where config.json has no vision_config
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
_VISION_DEFAULTS = {"image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_OUTER_KEYS = (  # of config.json, among those of the language model; slicing is read from the processor's config
    "version",
    "batch_vision_input",
    "drop_vision_last_layer",
    "image_size",
    "patch_size",
    "query_num",
    "slice_config",
    "slice_mode",
    "use_image_id",
    "vision_batch_size",
    "vision_config",
)
_RENAMES = (
    (r"^llm\.lm_head\.", "decoder.lm_head."),
    (r"^llm\.model\.", "decoder."),
    (r"^vpm\.", "tower."),
    (r"^resampler\.", "projector."),
)


class MiniCPMVModel(PackedModel):
    """Every slice of every picture, and every overview, is a picture of its own to the tower."""

    renames = _RENAMES

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        version = config.get("version")
        if str(version) != _VERSION:
            raise UnsupportedModelError(
                f"config.json's version is {version!r}; of the MiniCPM-V models, {_VERSION} is implemented. The others "
                "have other towers or language models under the same architecture."
            )
        text = {key: value for key, value in config.items() if key not in _OUTER_KEYS}
        decoder_config = DecoderConfig.from_hf({**text, "model_type": "qwen2"})
        drops_last = config.get("drop_vision_last_layer")
        vision = StrictConfig(config.get("vision_config") or _VISION, "vision_config")
        tower_config = ViTConfig.from_hf(
            vision, -2 if drops_last or drops_last is None else -1, defaults=_VISION_DEFAULTS
        )
        vision.finish()
        if decoder_config.hidden_size % HEAD_DIM:
            raise UnsupportedModelError(
                f"config.json's hidden_size is {decoder_config.hidden_size}; the resampler's heads are {HEAD_DIM} wide."
            )
        query_num = config.get("query_num") or 64
        resampler = Resampler(place, query_num, tower_config.hidden_size, decoder_config.hidden_size)
        tower = SiglipNavitTower(place, tower_config, norm)
        return cls("MiniCPMV", tower, resampler, Decoder(place, decoder_config, max_model_len))
