"""LLaVA-1.5, arXiv:2310.03744 (HF ``LlavaForConditionalGeneration``): tower, two-layer projector, decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from opsin.errors import UnsupportedModelError
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.reference import ACTIVATIONS
from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.clip import ClipTower
from opsin.models.towers.siglip import SiglipTower
from opsin.models.weights import WeightTable
from opsin.types import LayerCacheSpec, MediaLayout, ModelSpec

_TOWERS: dict[str, type[ClipTower] | type[SiglipTower]] = {
    "clip_vision_model": ClipTower,
    "siglip_vision_model": SiglipTower,
}
_DEFAULT_VISION = {  # LlavaConfig's, where config.json has no vision_config
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# Hub checkpoints (``language_model.model.``), transformers 5's module names (``model.language_model.``), and towers
# with and without the ``vision_model`` level.
_RENAMES = (
    (r"^(model\.language_model|language_model\.model)\.", "decoder."),
    (r"^(language_model\.)?lm_head\.", "decoder.lm_head."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "tower."),
    (r"^(model\.)?multi_modal_projector\.", "projector."),
)


class LlavaModel(nn.Module):
    """Implements ``VisionLanguageModel``. One picture is one tile."""

    architecture: ClassVar[str] = "LlavaForConditionalGeneration"

    def __init__(
        self,
        place: Placement,
        tower: ClipTower | SiglipTower,
        projector: Projector,
        decoder: Decoder,
        norm: PixelNorm,
        *,
        drop_first: bool,
    ) -> None:
        super().__init__()
        self.kernels = place.kernels
        self.dtype = place.dtype
        self.tower = tower
        self.projector = projector
        self.decoder = decoder
        self.drop_first = drop_first
        self.norm_table_3 = torch.from_numpy(norm.table()).to(place.device)
        config = decoder.config
        self.spec = ModelSpec(
            architecture=self.architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            feature_width=config.hidden_size,
            max_position=config.max_position,
            layers=tuple(LayerCacheSpec(spec.num_kv_heads, spec.head_dim) for spec in config.layers),
        )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        """Build the model of a config.json, its weights not yet filled.

        Args:
            norm: what the family's rule read from the processor config.
            max_model_len: the longest sequence to run; the config's own limit by default.

        Raises:
            UnsupportedModelError: an unknown key or a value that is not implemented.
        """
        strict = StrictConfig(config, "config.json")
        vision_config = strict.take("vision_config") or _DEFAULT_VISION
        text_config: dict[str, Any] = dict(strict.take("text_config") or {"model_type": "llama"})
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
            Decoder(place, decoder_config, max_model_len or decoder_config.max_position),
            norm,
            drop_first=strategy == "default",
        )

    def weight_table(self) -> WeightTable:
        """How LLaVA checkpoints name their tensors."""
        unused = [rf"tower\.{pattern}" for pattern in self.tower.unused_weights]
        unused.append(r"decoder\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
        if self.decoder.lm_head.is_tied:
            unused.append(r"decoder\.lm_head\.weight")
        return WeightTable(_RENAMES, tuple(unused))

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """(sum of num_features, D), all pictures in one pass."""
        return self.encode_tiles(tiles).flatten(0, 1)

    def encode_tiles(self, tiles: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Features of every tile of every item, (B, P, D)."""
        tiles_BYX3 = torch.stack([tile for item in tiles for tile in item])
        patches_PC = self.kernels.patchify(tiles_BYX3, self.tower.config.patch_size, self.norm_table_3, self.dtype)
        hidden_BPD = self.tower(patches_PC.unflatten(0, (len(tiles_BYX3), -1)))
        if self.drop_first:
            # CLIP's class token. HF drops SigLIP's first patch too, and checkpoints were trained so.
            hidden_BPD = hidden_BPD[:, 1:]
        return self.projector(hidden_BPD)

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Token embeddings, (T, D)."""
        return self.decoder.embed_tokens(ids_T)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        positions_AT: torch.Tensor,
        attention: AttentionInputs,
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """(T, D) after the final norm."""
        return self.decoder(hidden_TD, positions_AT, attention, caches)

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """(B, V) in float32."""
        return self.decoder.logits(hidden_BD)


class Projector(nn.Module):
    """Tower width to decoder width: linear, activation, linear."""

    def __init__(self, place: Placement, in_features: int, hidden_size: int, act: str, *, bias: bool) -> None:
        super().__init__()
        self.kernels = place.kernels
        self.act = act
        self.linear_1 = Linear(place, in_features, hidden_size, bias=bias)
        self.linear_2 = Linear(place, hidden_size, hidden_size, bias=bias)

    def forward(self, x_MD: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.kernels.activation(self.linear_1(x_MD), self.act))
