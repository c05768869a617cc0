"""InternVL3, arXiv:2504.10479 (HF ``InternVLForConditionalGeneration``): tower, pixel shuffle, projector, decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch

from opsin.errors import UnsupportedModelError
from opsin.kernels.reference import ACTIVATIONS
from opsin.layers import Placement
from opsin.layers.norm import LayerNorm
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.internvl.rule import read_tile
from opsin.models.picture_model import RENAMES
from opsin.models.projector import Projector, pixel_shuffle
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.tile_model import TileModel
from opsin.models.towers.intern_vit import InternViTConfig, InternViTTower

_PROJECTOR_EPS = 1e-5
_NTK_KEYS = {"rope_type", "type", "factor", "rope_theta"}
_RENAMES = (
    *RENAMES,
    (r"^tower\.encoder\.layer\.", "tower.encoder.layers."),
    (r"^tower\.embeddings\.patch_embeddings\.projection\.", "tower.embeddings.patch_embedding."),
    (r"^(tower\..*\.attention\.)projection_layer\.", r"\1out_proj."),
)


class InternVLModel(TileModel):
    """A picture is as many tiles as its plan makes, a frame of a video is one; each is encoded by itself."""

    architecture: ClassVar[str] = "InternVLForConditionalGeneration"
    renames = _RENAMES

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        strict = StrictConfig(config, "config.json")
        select = strict.take("vision_feature_layer", -1)
        if type(select) is not int:
            raise UnsupportedModelError(f"vision_feature_layer is {select!r}; this family takes a single layer.")
        # 'full' would keep the class token, and leave no square to shuffle.
        strict.choose("vision_feature_select_strategy", ("default",), "default")
        tower_config = InternViTConfig.from_hf(strict.take("vision_config", {}), select)
        decoder_config = DecoderConfig.from_hf(_text_config(strict, max_model_len))
        act = strict.choose("projector_hidden_act", tuple(ACTIVATIONS), "gelu")
        width, merge = tower_config.vit.hidden_size, read_tile(config).merge
        projector = ShuffledProjector(place, width, decoder_config.hidden_size, act, merge)
        strict.skip("downsample_ratio", "image_token_id", "image_seq_length")
        strict.finish()
        decoder = Decoder(place, decoder_config, max_model_len)
        return cls(place, InternViTTower(place, tower_config), projector, decoder, norm, drop_first=True)


class ShuffledProjector(Projector):
    """Pixel shuffle, norm, linear, activation, linear."""

    def __init__(self, place: Placement, width: int, hidden_size: int, act: str, merge: int) -> None:
        super().__init__(place, width * merge**2, hidden_size, act, bias=True)
        self.merge = merge
        self.layer_norm = LayerNorm(place, width * merge**2, _PROJECTOR_EPS)

    def forward(self, hidden_BPD: torch.Tensor, /) -> torch.Tensor:
        features_MD = super().forward(self.layer_norm(pixel_shuffle(hidden_BPD, self.merge)))
        return features_MD.unflatten(0, (len(hidden_BPD), -1))


def _text_config(strict: StrictConfig, max_model_len: int | None) -> dict[str, Any]:
    """The language model's settings.

    Raises:
        UnsupportedModelError: dynamic NTK scaling in a sequence that is long enough for it.
    """
    text: dict[str, Any] = dict(strict.take("text_config") or {})
    text.setdefault("model_type", "qwen2")
    tied = strict.take("tie_word_embeddings")  # transformers 5 writes it here; before, text_config's alone counted
    if tied is not None:
        text["tie_word_embeddings"] = tied
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if "dynamic" in (rope.get("rope_type"), rope.get("type")) and set(rope) <= _NTK_KEYS:
        # InternVL3's. It changes the frequencies of sequences past max_position_embeddings; up to there it is none.
        limit = text.get("max_position_embeddings", 32768)
        if (max_model_len or limit) > limit:
            raise UnsupportedModelError(
                f"rope_type 'dynamic' is implemented up to max_position_embeddings, {limit}; max_model_len is "
                f"{max_model_len}. Lower it."
            )
        theta = rope.get("rope_theta") or text.get("rope_theta")
        text.pop("rope_scaling", None)
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return text
