"""Pixels to features: a pass through the vision tower, launched from Python or replayed.

A pass is some hundred launches, for which Python needs as long as the device does, or longer. What the tower's blocks
do depends on the number of patches alone, so they are replayed from graphs of few sizes (``runner.trunk``). Before the
answer to a single small picture even the launches around them count. What these do depends on the sizes of its tiles,
so the whole pass, from bytes to features, is captured once such a picture has come again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch

from opsin.kernels import Kernels, select
from opsin.layers.staging import Uploads, handing_out, noting
from opsin.models.interface import VisionLanguageModel
from opsin.models.towers.patches import MAX_PASS
from opsin.models.towers.trunk import run_by
from opsin.runner.executor import Pixels
from opsin.runner.kept import Graph, KeptGraphs, Record
from opsin.runner.pixels import PixelLoader
from opsin.runner.trunk import TrunkGraphs
from opsin.types import MediaLayout

logger = logging.getLogger(__name__)

_MAX_PATCHES = 4096  # of a picture whose whole pass is captured; beside a larger one launches count for little
_MAX_GRAPHS = 32
_MAX_REMEMBERED = 256  # pictures' sizes

Tower = Callable[[Sequence[Pixels], Sequence[MediaLayout]], torch.Tensor]
"""Pixels of some items, and their layouts, to packed features (M, W)."""


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
    flat: torch.Tensor
    uploads: Uploads
    features_MW: torch.Tensor


class ReplayedTower:
    """Passes whose blocks come from graphs; of a small picture alone, once its sizes have been met, all that it is.

    Args:
        tower: what to capture.
        record: see ``Recorder.record``.
        max_patches: the most of a pass that is planned for.
    """

    def __init__(self, tower: EagerTower, record: Record, max_patches: int = MAX_PASS) -> None:
        self._tower = tower
        self._record = record
        self._trunk = TrunkGraphs(record, tower.device, max_patches)
        self._graphs: KeptGraphs[_Captured] = KeptGraphs(_MAX_GRAPHS, tower.device)
        self._met: OrderedDict[Hashable, None] = OrderedDict()  # what has come once, oldest first
        self._is_capturable = True

    def __call__(self, items: Sequence[Pixels], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        if len(items) == 1 and self._is_capturable and layouts[0].num_patches <= _MAX_PATCHES:
            (pixels,), (layout,) = items, layouts
            # What a model may read of a layout: see VisionLanguageModel.encode.
            sizes = (tuple(layout.plan.tile_sizes), len(layout.plan.frames), layout.numbers, layout.num_features)
            captured = self._graphs.find(sizes)
            if captured is not None:
                self._tower.load(pixels, layout, captured.flat)
                captured.graph.replay()
                return captured.features_MW.clone()
            if sizes in self._met and self._graphs.make_room():
                return self._capture(sizes, pixels, layout)
            self._remember(sizes)
        with run_by(self._trunk):
            return self._tower(items, layouts)

    @property
    def num_graphs(self) -> int:
        """Of whole passes."""
        return len(self._graphs)

    @property
    def num_trunk_graphs(self) -> int:
        return len(self._trunk)

    def _remember(self, sizes: Hashable) -> None:
        self._met.pop(sizes, None)
        self._met[sizes] = None
        if len(self._met) > _MAX_REMEMBERED:
            self._met.popitem(last=False)

    def _capture(self, sizes: Hashable, pixels: Pixels, layout: MediaLayout) -> torch.Tensor:
        """Run a pass from Python, and while the device is at it, record one for the next time."""
        del self._met[sizes]
        flat = torch.empty(layout.plan.num_bytes, dtype=torch.uint8, device=self._tower.device)
        self._tower.load(pixels, layout, flat)
        with noting() as uploads:
            features_MW = self._tower.encode([flat], [layout])
        try:
            with handing_out(uploads):
                graph, replayed_MW = self._record(lambda: self._tower.encode([flat], [layout]), warm_up=False)
        except RuntimeError as error:
            logger.warning("Passes of the vision tower cannot be captured as CUDA graphs: %s", error)
            self._is_capturable = False
            return features_MW
        self._graphs.keep(sizes, _Captured(graph, flat, uploads, replayed_MW))
        return features_MW


def cut_tiles(flat: torch.Tensor, layout: MediaLayout) -> list[torch.Tensor]:
    """uint8 (height, width, 3) views, tile by tile, for every frame of the plan."""
    sizes = layout.plan.tile_sizes * len(layout.plan.frames)
    parts = flat.split([height * width * 3 for height, width in sizes])
    return [part.view(height, width, 3) for part, (height, width) in zip(parts, sizes, strict=True)]
