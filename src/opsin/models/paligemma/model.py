"""PaliGemma, arXiv:2407.07726, and PaliGemma 2, arXiv:2412.03555 (HF ``PaliGemmaForConditionalGeneration``): SigLIP,
one linear layer, Gemma or Gemma 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from opsin.errors import UnsupportedModelError
from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.picture_model import RENAMES
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.tile_model import TileModel
from opsin.models.towers.siglip import SiglipTower

# Beside the tower's and the decoder's own: the number of patches once more, and that the rule lets prompts see ahead.
_VISION_EXTRAS = ("num_image_tokens", "num_positions", "projector_hidden_act")
_TEXT_EXTRAS = ("num_image_tokens", "use_bidirectional_attention")
_RENAMES = (*RENAMES, (r"^projector\.linear\.", "projector."))


class PaliGemmaModel(TileModel):
    """One picture is one tile."""

    architecture: ClassVar[str] = "PaliGemmaForConditionalGeneration"
    renames = _RENAMES

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        strict = StrictConfig(config, "config.json")
        vision = {key: value for key, value in strict.require("vision_config").items() if key not in _VISION_EXTRAS}
        text = {key: value for key, value in strict.require("text_config").items() if key not in _TEXT_EXTRAS}
        text["tie_word_embeddings"] = strict.take("tie_word_embeddings", True)
        tower_config = SiglipTower.read_config(vision, -1)
        decoder_config = DecoderConfig.from_hf(text)
        width = strict.take("projection_dim", 2048)
        if width != decoder_config.hidden_size:
            raise UnsupportedModelError(
                f"projection_dim is {width}; the decoder takes {decoder_config.hidden_size} values."
            )
        strict.skip("image_token_index", "image_token_id", "ignore_index")
        strict.skip("vocab_size", "_vocab_size", "hidden_size", "num_hidden_layers")  # the decoder's, once more
        strict.finish()
        return cls(
            place,
            SiglipTower(place, tower_config, norms_last=True),
            Linear(place, tower_config.hidden_size, width, bias=True),
            Decoder(place, decoder_config, max_model_len),
            norm,
        )
