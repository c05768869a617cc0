"""Idefics3, arXiv:2408.12637, and SmolVLM, arXiv:2504.05299 (HF ``Idefics3ForConditionalGeneration`` and
``SmolVLMForConditionalGeneration``): SigLIP, pixel shuffle and one linear layer, Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from opsin.errors import UnsupportedModelError
from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.idefics3.rule import Tile
from opsin.models.picture_model import PictureModel
from opsin.models.projector import pixel_shuffle
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.patches import in_passes
from opsin.models.towers.siglip_navit import SiglipNavitTower
from opsin.models.towers.vit import ViTConfig
from opsin.types import MediaLayout

_ARCHITECTURES = {"idefics3": "Idefics3ForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration"}
_VISION_DEFAULTS: dict[str, Any] = {  # Idefics3VisionConfig's
    "hidden_size": 1152,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
# What SmolVLM's training code left in its configs, and the values that mean what is implemented.
_LEFT_IN_TEXT = {"is_llama_config": True, "qk_layer_norms": False, "rope_interleaved": False, "use_resampler": False}
_INERT_IN_TEXT = ("_flash_attn_2_enabled", "neftune_noise_alpha", "perceiver_config", "transformers.js_config")
_LEFT_IN_VISION = ("max_image_size", "size", "tie_word_embeddings")
_LEFT_OUTSIDE = (
    "_pad_token_id",
    "image_token_id",
    "transformers.js_config",
    "use_reentrant_checkpointing",
    "vocab_size",
)
_RENAMES = (
    (r"^model\.text_model\.", "decoder."),
    (r"^lm_head\.", "decoder.lm_head."),
    (r"^model\.vision_model\.", "tower."),
    (r"^model\.connector\.modality_projection\.proj\.", "projector."),
)


class Idefics3Model(PictureModel):
    """A picture is as many tiles as its plan makes, each encoded by itself."""

    renames = _RENAMES

    def __init__(
        self,
        architecture: str,
        place: Placement,
        tile: Tile,
        tower_config: ViTConfig,
        decoder: Decoder,
        norm: PixelNorm,
    ) -> None:
        super().__init__(architecture, decoder)
        self.tile = tile
        self.tower = SiglipNavitTower(place, tower_config, norm)
        width = tower_config.hidden_size * tile.merge**2
        self.projector = Linear(place, width, decoder.config.hidden_size, bias=False)

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        strict = StrictConfig(config, "config.json")
        architecture = _ARCHITECTURES[strict.choose("model_type", tuple(_ARCHITECTURES), "idefics3")]
        tile = Tile.from_hf(config)
        strict.skip("scale_factor", *_LEFT_OUTSIDE)
        vision = StrictConfig({**_VISION_DEFAULTS, **(strict.take("vision_config") or {})}, "vision_config")
        tower_config = ViTConfig.from_hf(vision, -1, defaults=_VISION_DEFAULTS)
        vision.skip(*_LEFT_IN_VISION)
        vision.choose("use_base_siglip", (False,), False)
        vision.finish()
        text = _text_config(strict, tile)
        strict.finish()
        decoder = Decoder(place, DecoderConfig.from_hf(text), max_model_len)
        return cls(architecture, place, tile, tower_config, decoder, norm)

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """(sum of num_features, D), the tiles of all pictures in as few passes as can be."""
        every = [tile for item in tiles for tile in item]
        return in_passes(self._encode, every, [self.tile.grid**2] * len(every))

    def _encode(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        hidden_BPD = self.tower(tiles).x_PD.unflatten(0, (-1, self.tile.grid**2))
        return self.projector(pixel_shuffle(hidden_BPD, self.tile.merge))


def _text_config(strict: StrictConfig, tile: Tile) -> dict[str, Any]:
    """The language model's settings; those that SmolVLM's training code left in are checked and taken out.

    Raises:
        UnsupportedModelError: one of them says what is not implemented.
    """
    text: dict[str, Any] = dict(strict.take("text_config") or {})
    for key, implemented in {**_LEFT_IN_TEXT, "pixel_shuffle_factor": tile.merge}.items():
        given = text.pop(key, None)
        if given not in (None, implemented):
            raise UnsupportedModelError(f"text_config.{key} is {given!r}; implemented is {implemented!r}.")
    for key in _INERT_IN_TEXT:
        text.pop(key, None)
    return text | {"tie_word_embeddings": strict.take("tie_word_embeddings", False)}
