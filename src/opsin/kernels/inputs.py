"""The tensors that tell attention which token belongs to which request. Passed as arguments, never ambient.

Shape letters, here and in every room below: B requests (rows) in the step, T text positions, P patches, M media
features, D model width, F feed-forward width, N query heads, K key/value heads, H head size, V vocabulary,
S slots per cache block, L blocks in a table, A rotary axes. ``B1`` is B + 1.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class LayerCache(NamedTuple):
    """One layer's paged keys and values, each (num_blocks, block_size, K, H), in the model's dtype or e4m3."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """How a step's T flat tokens map to B rows and to cache slots.

    Row b owns the flat tokens [query_start_B1[b], query_start_B1[b + 1]); they are the last ones of its
    ``context_lens_B[b]`` positions. Host copies (``query_lens``, ``context_lens``) let kernels size their work
    without waiting for the device.

    Attributes:
        query_start_B1: int32.
        context_lens_B: int32, positions visible to the row's last token, itself included.
        block_tables_BL: int32, block ids per row; entries past the context are 0, the scratch block.
        slot_mapping_T: int64, block * block_size + offset where each token's key and value are written.
        visible_end_T: int32; token t sees positions below visible_end_T[t]. None is causal: own position + 1.
        visible_begin_T: int32; token t sees positions from visible_begin_T[t] on although a layer's window ends later.
            None leaves it to the window.
        kept: what kernels make of all this for one layer and read again in those behind it.
    """

    query_start_B1: torch.Tensor
    context_lens_B: torch.Tensor
    block_tables_BL: torch.Tensor
    slot_mapping_T: torch.Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    visible_end_T: torch.Tensor | None = None
    visible_begin_T: torch.Tensor | None = None
    kept: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any], repr=False, compare=False)

    @property
    def is_causal(self) -> bool:
        """No token sees anything behind itself, nor beyond a window."""
        return self.visible_end_T is None and self.visible_begin_T is None

    @property
    def is_decode(self) -> bool:
        """Every row runs exactly one token."""
        return len(self.query_lens) == self.query_start_B1.shape[0] - 1 and max(self.query_lens, default=0) == 1
