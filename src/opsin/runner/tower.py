"""Pixels to features: a pass through the vision tower, launched from Python or replayed.

A pass over one picture is some hundred launches, for which Python needs longer than the device. What it does depends on
the sizes of its tiles alone, so the whole of it, from bytes to features, is captured once its sizes have come again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from opsin.kernels import Kernels, select
from opsin.layers.staging import Uploads, handing_out, noting
from opsin.models.interface import VisionLanguageModel
from opsin.runner.executor import Pixels
from opsin.runner.pixels import PixelLoader
from opsin.types import MediaLayout

logger = logging.getLogger(__name__)

_MAX_PATCHES = 4096  # a larger pass keeps the device busier than Python
_MAX_GRAPHS = 32
_MAX_REMEMBERED = 256  # sets of sizes
_IDLE_PASSES = 256  # after which a graph may make way for another

Tower = Callable[[Sequence[Pixels], Sequence[MediaLayout]], torch.Tensor]
"""Pixels of some items, and their layouts, to packed features (M, W)."""


class Graph(Protocol):
    def replay(self) -> None: ...


class Record(Protocol):
    """``Recorder.record``."""

    def __call__(self, work: Callable[[], torch.Tensor], *, warm_up: bool) -> tuple[Graph, torch.Tensor]: ...


class EagerTower:
    """All items in one packed pass, launched from Python.

    Args:
        kernels: those that resize what comes raw; by default the device's best.
    """

    def __init__(self, model: VisionLanguageModel, device: torch.device, kernels: Kernels | None = None) -> None:
        self.device = device
        self._model = model
        self._loader = PixelLoader((kernels or select(device)).resample, device)

    def __call__(self, items: Sequence[Pixels], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        return self.encode([self.load(*pair) for pair in zip(items, layouts, strict=True)], layouts)

    def load(self, pixels: Pixels, layout: MediaLayout, into: torch.Tensor | None = None) -> torch.Tensor:
        """One item's tiles on the device, flat uint8; ``into`` says where."""
        return self._loader.load(pixels, layout.plan, into)

    def encode(self, flats: Sequence[torch.Tensor], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """Of pixels that are on the device, flat uint8 each."""
        return self._model.encode([cut_tiles(*pair) for pair in zip(flats, layouts, strict=True)], layouts)


class _Captured(NamedTuple):
    """A graph, and the memory outside its pool that it reads; nothing else keeps that alive."""

    graph: Graph
    flats: list[torch.Tensor]
    uploads: Uploads
    features_MW: torch.Tensor


class ReplayedTower:
    """Small passes from graphs, once their sizes have been met; others from Python.

    Args:
        tower: what to capture.
        record: see ``Recorder.record``.
    """

    def __init__(self, tower: EagerTower, record: Record) -> None:
        self._tower = tower
        self._record = record
        self._met: dict[Any, int] = {}  # what a pass depends on: the number of the last pass like it, oldest first
        self._graphs: dict[Any, _Captured] = {}
        self._num_passes = 0
        self._is_capturable = True

    def __call__(self, items: Sequence[Pixels], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        if not self._is_capturable or sum(layout.num_patches for layout in layouts) > _MAX_PATCHES:
            return self._tower(items, layouts)
        # What a model may read of a layout: see VisionLanguageModel.encode.
        sizes = tuple((tuple(x.plan.tile_sizes), len(x.plan.frames), x.numbers, x.num_features) for x in layouts)
        self._num_passes += 1
        captured = self._graphs.get(sizes)
        if captured is not None:
            self._remember(sizes)
            for item in zip(items, layouts, captured.flats, strict=True):
                self._tower.load(*item)
            captured.graph.replay()
            return captured.features_MW.clone()
        has_come_again = sizes in self._met
        self._remember(sizes)
        if not (has_come_again and self._make_room()):
            return self._tower(items, layouts)
        return self._capture(sizes, items, layouts)

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def _remember(self, sizes: Any) -> None:
        self._met.pop(sizes, None)
        self._met[sizes] = self._num_passes
        if len(self._met) > _MAX_REMEMBERED:
            del self._met[next(known for known in self._met if known not in self._graphs)]

    def _make_room(self) -> bool:
        """Give up the graph that has been idle longest, if there are many and it has been for long."""
        if len(self._graphs) < _MAX_GRAPHS:
            return True
        oldest = next(known for known in self._met if known in self._graphs)
        if self._num_passes - self._met[oldest] < _IDLE_PASSES:
            return False
        if self._tower.device.type == "cuda":
            torch.cuda.synchronize(self._tower.device)  # it may still be running
        del self._graphs[oldest]
        return True

    def _capture(self, sizes: Any, items: Sequence[Pixels], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """Run a pass from Python, and while the device is at it, record one for the next time."""
        flats = [torch.empty(x.plan.num_bytes, dtype=torch.uint8, device=self._tower.device) for x in layouts]
        for item in zip(items, layouts, flats, strict=True):
            self._tower.load(*item)
        with noting() as uploads:
            features_MW = self._tower.encode(flats, layouts)
        try:
            with handing_out(uploads):
                graph, replayed_MW = self._record(lambda: self._tower.encode(flats, layouts), warm_up=False)
        except RuntimeError as error:
            logger.warning("The vision tower cannot be captured as a CUDA graph, so it runs without: %s", error)
            self._is_capturable = False
            return features_MW
        self._graphs[sizes] = _Captured(graph, flats, uploads, replayed_MW)
        return features_MW


def cut_tiles(flat: torch.Tensor, layout: MediaLayout) -> list[torch.Tensor]:
    """uint8 (height, width, 3) views, tile by tile, for every frame of the plan."""
    sizes = layout.plan.tile_sizes * len(layout.plan.frames)
    parts = flat.split([height * width * 3 for height, width in sizes])
    return [part.view(height, width, 3) for part, (height, width) in zip(parts, sizes, strict=True)]
