"""Captured passes through the tower: some are kept, and one that is idle for long makes way for another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

import torch

_IDLE_PASSES = 256  # after which a graph may make way for another

T = TypeVar("T")


class Graph(Protocol):
    def replay(self) -> None: ...


class Record(Protocol):
    """``Recorder.record``."""

    def __call__(self, work: Callable[[], torch.Tensor], *, warm_up: bool) -> tuple[Graph, torch.Tensor]: ...


class KeptGraphs(Generic[T]):
    """Graphs, each with the memory that it reads, by what a pass depends on.

    Args:
        most: how many to keep.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self._most = most
        self._device = device
        self._num_passes = 0
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()  # and the last pass of each, oldest first

    def find(self, key: Hashable) -> T | None:
        """The graph for a pass; to be asked once for each."""
        self._num_passes += 1
        if key not in self._kept:
            return None
        graph, _ = self._kept.pop(key)
        self._kept[key] = graph, self._num_passes
        return graph

    def make_room(self) -> bool:
        """One more may be kept; if there are many, the one that has been idle longest is given up for it."""
        if len(self._kept) < self._most:
            return True
        oldest, (_, last_pass) = next(iter(self._kept.items()))
        if self._num_passes - last_pass < _IDLE_PASSES:
            return False
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # it may still be running
        del self._kept[oldest]
        return True

    def keep(self, key: Hashable, graph: T) -> None:
        self._kept[key] = graph, self._num_passes

    def __len__(self) -> int:
        return len(self._kept)
