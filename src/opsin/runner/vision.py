"""Pictures on their way through the tower: payloads wait here, features stay here until the plan drops them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opsin.layers.staging import upload
from opsin.runner.executor import Embedding, Payload, Pixels
from opsin.runner.tower import Tower
from opsin.types import EncodeItem, RowPlan


class VisionStore:
    """Payloads by media key, features by the scheduler's feature id. The scheduler decides what stays."""

    def __init__(self, tower: Tower, device: torch.device, dtype: torch.dtype) -> None:
        self.tower = tower
        self._device = device
        self._dtype = dtype
        self._payloads: dict[bytes, Payload] = {}
        self._features: dict[int, torch.Tensor] = {}

    def put(self, key: bytes, payload: Payload) -> None:
        self._payloads[key] = payload

    def drop(self, features: Sequence[int], payloads: Sequence[bytes]) -> None:
        for feature_id in features:
            del self._features[feature_id]
        for key in payloads:
            del self._payloads[key]

    def encode(self, items: Sequence[EncodeItem]) -> None:
        """Turn the items' payloads into features: all pictures in one packed pass through the tower."""
        items_pixels: list[tuple[EncodeItem, Pixels]] = []
        for item in items:
            payload = self._payloads.pop(item.key)
            if isinstance(payload, Embedding):
                (given,) = upload([payload.data], self._device)
                # A copy, since on a CPU it would be the caller's own memory, who may write to it.
                self._features[item.feature_id] = given.to(self._dtype, copy=True)
            else:
                items_pixels.append((item, payload))
        if not items_pixels:
            return
        packed_MW = self.tower([pixels for _, pixels in items_pixels], [item.layout for item, _ in items_pixels])
        parts: list[torch.Tensor] = [packed_MW]
        if len(items_pixels) > 1:  # a slice would keep the whole pack alive after the other items are dropped
            sizes = [item.layout.num_features for item, _ in items_pixels]
            parts = torch.split_with_sizes_copy(packed_MW, sizes)  # pyright: ignore[reportAssignmentType]  it copies
        self._features.update(zip([item.feature_id for item, _ in items_pixels], parts, strict=True))

    def scatter(
        self,
        hidden_TD: torch.Tensor,
        rows: Sequence[RowPlan],
        row_starts: Sequence[int],
        extra_TE: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Overwrite placeholder positions' embeddings with the features that the rows use; in place.

        Args:
            extra_TE: zeros, where the columns of features wider than D belong, which are for deeper layers.

        Returns:
            extra_TE: the one given, or a new one if there are such features.
        """
        num_tokens, width = hidden_TD.shape
        for row, row_start in zip(rows, row_starts, strict=True):
            for use in row.features:
                at = slice(row_start + use.offset, row_start + use.offset + use.length)
                source = self._features[use.feature_id][use.feature_start : use.feature_start + use.length]
                hidden_TD[at] = source[:, :width]
                if source.shape[1] > width:
                    if extra_TE is None:
                        extra_TE = hidden_TD.new_zeros(num_tokens, source.shape[1] - width)
                    extra_TE[at] = source[:, width:]
        return extra_TE

    @property
    def num_features_held(self) -> int:
        return len(self._features)

    @property
    def num_payloads_held(self) -> int:
        return len(self._payloads)
