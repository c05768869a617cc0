"""A step under way: device tensors on their way to the host, and the results that they will become."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opsin.runner.pooling import RowValues
from opsin.runner.sampler import SampledTokens, logprob_lists
from opsin.types import PositionLogprobs, RowResult, StepResult

_NOT_FINITE = "The model's output was not finite."


class LaunchedStep:
    """Implements ``PendingStep``.

    Args:
        results: one per row of the plan, to be filled in.
        sampled: what was drawn, if anything.
        sampled_rows: the result that each draw belongs to, and how many log-probabilities it wants.
        pooled: results with the vector that each of them gets.
        values: what is read at single positions of rows.
    """

    def __init__(
        self,
        step: int,
        results: list[RowResult],
        sampled: SampledTokens | None = None,
        sampled_rows: Sequence[tuple[RowResult, int | None]] = (),
        pooled: Sequence[tuple[RowResult, torch.Tensor]] = (),
        values: Sequence[RowValues] = (),
    ) -> None:
        self._step = step
        self._results = results
        self._rows = sampled_rows
        self._sampled = None if sampled is None else _to_host(sampled)
        self._pooled = [(result, _copy(vector_D)) for result, vector_D in pooled]
        self._values = [(row, _copy(row.values_PK)) for row in values]
        self._copied: torch.cuda.Event | None = None
        tensors = [vector_D for _, vector_D in pooled] + [row.values_PK for row in values]
        on_gpu = (sampled is not None and sampled.ids_B.is_cuda) or any(tensor.is_cuda for tensor in tensors)
        if on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def result(self) -> StepResult:
        """Wait for the step and return what it brought."""
        if self._copied is not None:
            self._copied.synchronize()
        for result, vector_D in self._pooled:
            if vector_D.isfinite().all():
                result.embedding = vector_D.tolist()
            else:
                result.error = _NOT_FINITE
        for row, values_PK in self._values:
            if not row.settle(values_PK):
                row.result.error = _NOT_FINITE
        if self._sampled is not None:
            ids = self._sampled.ids_B.tolist()
            finite = self._sampled.finite_B.tolist()
            logprobs: list[PositionLogprobs | None] = [None] * len(ids)
            if self._sampled.top is not None:
                logprobs = logprob_lists(self._sampled.top, ids, [count for _, count in self._rows])
            for i, (row, _) in enumerate(self._rows):
                if finite[i]:
                    row.token_id, row.logprobs = ids[i], logprobs[i]
                else:
                    row.error = _NOT_FINITE
        return StepResult(self._step, self._results)


def _to_host(sampled: SampledTokens) -> SampledTokens:
    top = sampled.top
    if top is not None:
        ids_BK, logprobs_BK, chosen_B, rank_B = top
        top = _copy(ids_BK), _copy(logprobs_BK), _copy(chosen_B), _copy(rank_B)
    return SampledTokens(_copy(sampled.ids_B), _copy(sampled.finite_B), top)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Start the copy of a device tensor to pinned memory; a host tensor is returned as it is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
