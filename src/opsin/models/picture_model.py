"""What the ``model.py`` of every family shares: one ``Decoder`` behind whatever makes the features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.layers import Placement
from opsin.models.decoder import Decoder
from opsin.models.rule import PixelNorm
from opsin.models.weights import WeightTable
from opsin.types import LayerCacheSpec, MediaLayout, ModelSpec

# Hub checkpoints (``language_model.model.``), transformers 5's module names (``model.language_model.``), and towers
# with and without the ``vision_model`` level.
RENAMES = (
    (r"^(model\.language_model|language_model\.model)\.", "decoder."),
    (r"^(language_model\.)?lm_head\.", "decoder.lm_head."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "tower."),
    (r"^(model\.)?multi_modal_projector\.", "projector."),
)


class PictureModel(nn.Module, ABC):
    """The decoder's half of ``VisionLanguageModel``. A family brings its tower, as ``encode``, and reads its
    checkpoints, as ``from_hf`` and ``renames``.

    Attributes:
        renames: ``WeightTable.renames`` of the family's checkpoints; what nearly all in Hugging Face layout need.
    """

    renames: ClassVar[tuple[tuple[str, str], ...]] = RENAMES

    def __init__(
        self, architecture: str, decoder: Decoder, *, num_position_axes: int = 1, num_deep_layers: int = 0
    ) -> None:
        """
        Args:
            num_deep_layers: decoder layers, from the first, that features add columns of their own behind.
        """
        super().__init__()
        self.decoder = decoder
        config = decoder.config
        self.spec = ModelSpec(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            feature_width=config.hidden_size * (1 + num_deep_layers),
            max_position=config.max_position,
            layers=tuple(LayerCacheSpec(spec.num_kv_heads, spec.head_dim) for spec in config.layers),
            num_position_axes=num_position_axes,
        )

    @classmethod
    @abstractmethod
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

    def weight_table(self) -> WeightTable:
        """How the family's checkpoints name their tensors; its parts say as ``unused_weights`` what they leave out."""
        return WeightTable.of(
            self.renames, {name: getattr(part, "unused_weights", ()) for name, part in self.named_children()}
        )

    @abstractmethod
    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """(sum of num_features, D) of the pictures of many requests, packed; as ``VisionLanguageModel`` says."""

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Token embeddings, (T, D)."""
        return self.decoder.embed_tokens(ids_T)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        positions_AT: torch.Tensor,
        attention: AttentionInputs,
        caches: Sequence[LayerCache],
        extra_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, D) after the final norm."""
        return self.decoder(hidden_TD, positions_AT, attention, caches, extra_TE)

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """(B, V) in float32."""
        return self.decoder.logits(hidden_BD)

    def ranking(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """(B, V) in any dtype."""
        return self.decoder.ranking(hidden_BD)
