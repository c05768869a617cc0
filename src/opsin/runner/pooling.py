"""What is read off hidden states when no token is drawn: vectors, and log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from opsin.layers.staging import upload
from opsin.params import PoolingParams
from opsin.types import RowPlan, RowResult

_LOGITS_ROWS = 256  # positions whose (rows, V) logits are in memory at once


class RowValues(NamedTuple):
    """Numbers read at several positions of one row.

    Attributes:
        positions: within the request.
        counts: how many of a position's K numbers are its own; the rest is padding.
    """

    result: RowResult
    positions: Sequence[int]
    counts: Sequence[int]
    values_PK: torch.Tensor

    def settle(self, values_PK: torch.Tensor) -> bool:
        """Put the numbers, now on the host, into the row's result; False where they are not finite."""
        if not values_PK.isfinite().all():
            return False
        rows = zip(self.positions, self.counts, values_PK.numpy(), strict=True)
        self.result.values = {position: row[:count].tobytes() for position, count, row in rows}
        return True


def pool(hidden_D: torch.Tensor, params: PoolingParams) -> torch.Tensor:
    """Final hidden states (..., D) in float32, cut to ``dimensions`` and then normalised."""
    vector_D = hidden_D.float()
    if params.dimensions is not None:
        vector_D = vector_D[..., : params.dimensions]
    return torch.nn.functional.normalize(vector_D, dim=-1) if params.normalize else vector_D


def read_row(
    result: RowResult,
    row: RowPlan,
    hidden_TD: torch.Tensor,
    params: PoolingParams,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
) -> RowValues | None:
    """What a task that reads single positions wants of this row; None for the others, or where it wants nothing.

    Args:
        hidden_TD: the row's own final hidden states.
        logits_of: maps (B, D) to (B, V).
    """
    end = row.start + row.num_tokens
    if params.task == "token_embed":
        vectors_TD = pool(hidden_TD, params)
        return RowValues(result, range(row.start, end), [vectors_TD.shape[1]] * row.num_tokens, vectors_TD)
    targets = [(position, ids) for position, ids in params.targets if row.start <= position < end]
    if not targets:
        return None
    counts = [len(ids) for _, ids in targets]
    most = max(counts)
    at = np.array([position - row.start for position, _ in targets])
    at_P, ids_PK = upload([at, np.array([ids + ids[:1] * (most - len(ids)) for _, ids in targets])], hidden_TD.device)
    logprobs: list[torch.Tensor] = []
    for i in range(0, len(targets), _LOGITS_ROWS):
        chunk = slice(i, i + _LOGITS_ROWS)
        logprobs.append(logits_of(hidden_TD[at_P[chunk]]).log_softmax(dim=-1).gather(1, ids_PK[chunk]))
    return RowValues(result, [position for position, _ in targets], counts, torch.cat(logprobs))
