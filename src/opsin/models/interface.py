"""What the runner asks of a model. Families implement it in their ``model.py``, on ``PictureModel``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.types import MediaLayout, ModelSpec


class VisionLanguageModel(Protocol):
    """Tower, projector and decoder behind five calls. All tensors are on the model's device.

    ``spec`` says what planning needs.
    """

    spec: ModelSpec

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights, as ``torch.nn.Module`` gives them."""
        ...

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """Run tower and projector on the pictures of many requests, packed.

        Args:
            tiles: per item, its uint8 (height, width, 3) tiles as its plan orders them.
            layouts: of which only ``numbers`` and ``num_features`` may be read: with equal ones, and tiles of equal
                sizes, a pass is replayed rather than called again.

        Returns:
            (sum of num_features, feature_width) in the items' order, in the model's dtype.
        """
        ...

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Token embeddings, (T, D)."""
        ...

    def forward(
        self,
        hidden_TD: torch.Tensor,
        positions_AT: torch.Tensor,
        attention: AttentionInputs,
        caches: Sequence[LayerCache],
        extra_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the decoder, writing this step's keys and values into ``caches``.

        Args:
            extra_TE: where features are wider than D, their further columns, zeros at positions without features: what
                deeper layers add (Qwen3-VL's deepstack). None when no position of the step has any.

        Returns:
            (T, D), after the final norm.
        """
        ...

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """(B, V) in float32."""
        ...

    def ranking(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """(B, V) in any dtype: of the same order as ``logits``, and finite where these are."""
        ...
