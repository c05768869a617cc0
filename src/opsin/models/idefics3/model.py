"""Idefics3, arXiv:2408.12637, and SmolVLM, arXiv:2504.05299 (HF ``Idefics3ForConditionalGeneration`` and
``SmolVLMForConditionalGeneration``): SigLIP, pixel shuffle and one linear layer, Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.idefics3.rule import read_tile
from opsin.models.packed_model import PackedModel
from opsin.models.projector import pixel_shuffle
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.siglip_navit import PackedPatches, SiglipNavitTower

_ARCHITECTURES = {"idefics3": "Idefics3ForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration"}
# What SmolVLM's training code left in its configs, and the values that mean what is implemented.
_LEFT_IN_TEXT = {"is_llama_config": True, "qk_layer_norms": False, "rope_interleaved": False, "use_resampler": False}
_INERT_IN_TEXT = ("_flash_attn_2_enabled", "neftune_noise_alpha", "perceiver_config", "transformers.js_config")
_INERT_OUTSIDE = ("_pad_token_id", "transformers.js_config", "use_reentrant_checkpointing", "vocab_size")


class Idefics3Model(PackedModel):
    """A picture is as many tiles as its plan makes, each encoded by itself."""

    renames = (
        (r"^model\.text_model\.", "decoder."),
        (r"^lm_head\.", "decoder.lm_head."),
        (r"^model\.vision_model\.", "tower."),
        (r"^model\.connector\.modality_projection\.proj\.", "projector.linear."),
    )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        strict = StrictConfig(config, "config.json")
        architecture = _ARCHITECTURES[strict.choose("model_type", tuple(_ARCHITECTURES), "idefics3")]
        merge = read_tile(config).merge
        strict.skip("scale_factor", "image_token_id", *_INERT_OUTSIDE)
        tower_config = SiglipNavitTower.read_config(strict.take("vision_config", {}))
        text = StrictConfig(strict.take("text_config", {}), "text_config")
        for key, implemented in {**_LEFT_IN_TEXT, "pixel_shuffle_factor": merge}.items():
            text.choose(key, (implemented,), implemented)
        text.skip(*_INERT_IN_TEXT)
        tied = strict.take("tie_word_embeddings", False)
        strict.finish()
        decoder_config = DecoderConfig.from_hf(text.rest() | {"tie_word_embeddings": tied})
        projector = Connector(place, tower_config.hidden_size, decoder_config.hidden_size, merge)
        decoder = Decoder(place, decoder_config, max_model_len)
        return cls(architecture, SiglipNavitTower(place, tower_config, norm), projector, decoder)


class Connector(nn.Module):
    """Pixel shuffle, linear."""

    def __init__(self, place: Placement, width: int, hidden_size: int, merge: int) -> None:
        super().__init__()
        self.merge = merge
        self.linear = Linear(place, width * merge**2, hidden_size, bias=False)

    def forward(self, tiles: PackedPatches) -> torch.Tensor:
        hidden_BPD = tiles.x_PD.unflatten(0, (len(tiles.grids), -1))
        return self.linear(pixel_shuffle(hidden_BPD, self.merge))
