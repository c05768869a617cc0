"""A step under way: device tensors on their way to the host, and the results that they will become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from opsin.runner.pooling import RowValues
from opsin.runner.sampler import SampledTokens, logprob_lists
from opsin.types import RowResult, StepResult

_NOT_FINITE = "The model's output was not finite."


class LaunchedStep:
    """Implements ``PendingStep``.

    Args:
        results: one per row of the plan, to be filled in.
        sampled: what was drawn, if anything.
        drawn: the index of the result that each draw belongs to.
        counts: how many log-probabilities it wants, for draws that want any.
        pooled: results with the vector that each of them gets.
        values: what is read at single positions of rows.
    """

    def __init__(
        self,
        step: int,
        results: list[RowResult],
        sampled: SampledTokens | None = None,
        drawn: Sequence[int] = (),
        counts: Mapping[int, int | None] = MappingProxyType({}),
        pooled: Sequence[tuple[RowResult, torch.Tensor]] = (),
        values: Sequence[RowValues] = (),
    ) -> None:
        self._step = step
        self._results = results
        self._drawn, self._counts = drawn, counts
        self._sampled = None if sampled is None else _to_host(sampled)
        self._pooled = [(result, _copy(vector_D)) for result, vector_D in pooled]
        self._values = [(row, _copy(row.values_PK)) for row in values]
        self._copied: torch.cuda.Event | None = None
        tensors = [vector_D for _, vector_D in pooled] + [row.values_PK for row in values]
        on_gpu = (sampled is not None and sampled.drawn_2B.is_cuda) or any(tensor.is_cuda for tensor in tensors)
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
            self._settle(self._sampled)
        return StepResult(self._step, self._results)

    def _settle(self, sampled: SampledTokens) -> None:
        """Put what was drawn, now on the host, into its rows' results."""
        ids, finite = sampled.drawn_2B.tolist()
        drawn = [self._results[b] for b in self._drawn]
        for result, token_id, is_finite in zip(drawn, ids, finite, strict=True):
            if is_finite:
                result.token_id = token_id
            else:
                result.error = _NOT_FINITE
        if sampled.top is not None:
            counts = [self._counts.get(i) if is_finite else None for i, is_finite in enumerate(finite)]
            for result, logprobs in zip(drawn, logprob_lists(sampled.top, ids, counts), strict=True):
                result.logprobs = logprobs


def _to_host(sampled: SampledTokens) -> SampledTokens:
    top = sampled.top
    if top is not None:
        ids_BK, logprobs_BK, chosen_B, rank_B = top
        top = _copy(ids_BK), _copy(logprobs_BK), _copy(chosen_B), _copy(rank_B)
    return SampledTokens(_copy(sampled.drawn_2B), top)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Start the copy of a device tensor to pinned memory; a host tensor is returned as it is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
