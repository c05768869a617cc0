"""Mistral 3 (HF ``Mistral3ForConditionalGeneration``) and Pixtral, arXiv:2410.07073 (``LlavaForConditionalGeneration``
with a Pixtral tower): a tower for pictures of any size, a learned merger in the former, Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch

from opsin.errors import UnsupportedModelError
from opsin.kernels.reference import ACTIVATIONS
from opsin.layers import Placement
from opsin.layers.norm import RMSNorm, normed
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.mistral3.rule import PatchGeometry
from opsin.models.packed_model import PackedModel
from opsin.models.picture_model import RENAMES
from opsin.models.projector import PatchMerger, Projector
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.pixtral import PixtralConfig, PixtralTower

_DEFAULTS: dict[str, dict[str, Any]] = {  # of Mistral3Config and LlavaConfig
    "mistral3": {
        "architecture": "Mistral3ForConditionalGeneration",
        "vision_config": {"patch_size": 14, "image_size": 1540},
        "vision_feature_layer": -1,
        "multimodal_projector_bias": False,
    },
    "llava": {
        "architecture": "LlavaForConditionalGeneration",
        "vision_config": {},
        "vision_feature_layer": -2,
        "multimodal_projector_bias": True,
    },
}


class Mistral3Model(PackedModel):
    """One picture is one tile of its own size."""

    renames = (*RENAMES, (r"^(tower\..*\.attention\.)o_proj\.", r"\1out_proj."))

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        strict = StrictConfig(config, "config.json")
        model_type = strict.choose("model_type", tuple(_DEFAULTS), "mistral3")
        defaults = _DEFAULTS[model_type]
        geometry = PatchGeometry.from_hf(config)
        select = strict.take("vision_feature_layer", defaults["vision_feature_layer"])
        tower_config = PixtralConfig.from_hf(strict.take("vision_config") or defaults["vision_config"], select)
        text: dict[str, Any] = {"model_type": "mistral", **strict.take("text_config", {})}
        tied = strict.take("tie_word_embeddings")
        if model_type == "mistral3" and tied is not None:
            text["tie_word_embeddings"] = tied  # transformers 5's; before, text_config's alone counted
        elif tied:
            text["tie_word_embeddings"] = True
        decoder_config = DecoderConfig.from_hf(text)
        sizes = (tower_config.vit.hidden_size * len(tower_config.vit.select), decoder_config.hidden_size)
        act = strict.choose("projector_hidden_act", tuple(ACTIVATIONS), "gelu")
        bias = strict.take("multimodal_projector_bias", defaults["multimodal_projector_bias"])
        if model_type == "mistral3":
            if len(tower_config.vit.select) != 1:
                raise UnsupportedModelError(f"vision_feature_layer is {select!r}; this family takes a single layer.")
            strict.skip("spatial_merge_size")
            projector = MergingProjector(
                place, *sizes, act, bias=bias, merge=geometry.merge, norm_eps=decoder_config.norm_eps
            )
        else:
            # 'default' would drop the first patch of the first picture.
            strict.choose("vision_feature_select_strategy", ("full",), "default")
            projector = Projector(place, *sizes, act, bias=bias)
        strict.skip("image_token_index", "image_token_id", "image_seq_length", "ignore_index", "vocab_size")
        strict.finish()
        tower = PixtralTower(place, tower_config, norm, geometry.merge)
        return cls(defaults["architecture"], tower, projector, Decoder(place, decoder_config, max_model_len))


class MergingProjector(Projector):
    """Norm, merger, linear, activation, linear."""

    def __init__(
        self,
        place: Placement,
        in_features: int,
        hidden_size: int,
        act: str,
        *,
        bias: bool,
        merge: int,
        norm_eps: float,
    ) -> None:
        super().__init__(place, in_features, hidden_size, act, bias=bias)
        self.merge = merge
        self.norm = RMSNorm(place, in_features, norm_eps)
        self.patch_merger = PatchMerger(place, in_features, merge)

    def forward(self, x_MD: torch.Tensor) -> torch.Tensor:
        """Patches in merge order to one feature for each block."""
        merged_MD = self.patch_merger(normed(self.norm, x_MD).unflatten(0, (-1, self.merge**2)).flatten(1))
        return super().forward(merged_MD)
