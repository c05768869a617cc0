"""A tower's trunk, captured once for each of few numbers of patches, and replayed whatever pictures they make up.

Patches are padded, and what is added sees itself alone. How they are divided into pictures and windows is read on the
device, from tables with room for more of them.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from opsin.layers.staging import num_bytes, refill, views
from opsin.models.towers.attention import Segments
from opsin.models.towers.patches import MAX_PASS
from opsin.models.towers.trunk import Trunk, ends, launch
from opsin.runner.kept import Graph, KeptGraphs, Record

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 64
MAX_PATCHES = 8192  # a larger pass keeps the device busier than Python, and what pads it would be computed for nothing
_MAX_FLOAT32 = 1024  # full precision has no kernel that reads lengths on the device, but a mask of all pairs
_STEP = 128
_ROOM = 16  # segments at least; empty ones cost attention some time, too


class _Captured(NamedTuple):
    """A graph, and the memory outside its pool that it reads and writes; nothing else need keep that alive."""

    graph: Graph
    x_PD: torch.Tensor
    packed: torch.Tensor
    result_MW: torch.Tensor


class TrunkGraphs:
    """Runs trunks (``models.towers.trunk.Runs``), from Python where none is captured that fits.

    Args:
        record: see ``Recorder.record``.
        max_patches: the most of a pass that there will be.
    """

    def __init__(self, record: Record, device: torch.device, max_patches: int = MAX_PASS) -> None:
        self._record = record
        self._device = device
        self._max_patches = max_patches
        self._graphs: KeptGraphs[_Captured] = KeptGraphs(_MAX_GRAPHS, device)
        # One for all sizes of a trunk: each pass is done with them before the next one.
        self._inputs: dict[Trunk, torch.Tensor] = {}
        self._results: dict[Trunk, torch.Tensor] = {}
        self._packed = torch.empty(0, dtype=torch.uint8, device=device)
        self._is_capturable = True

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self, trunk: Trunk, x_PD: torch.Tensor, lens: Sequence[Sequence[int]], numbers: Sequence[np.ndarray]
    ) -> torch.Tensor:
        num_patches = len(x_PD)
        size, most = padded_size(num_patches), self._most(x_PD.dtype)
        if size > most or not self._is_capturable:
            return launch(trunk, x_PD, lens, numbers)
        arrays = padded(size, num_patches, lens, numbers)
        captured = self._graphs.find(_key(trunk, size, arrays))
        if captured is not None:
            captured.x_PD[:num_patches] = x_PD
            refill(captured.packed, arrays)
            captured.graph.replay()
            result_MW = captured.result_MW
        elif self._graphs.make_room():
            try:
                if trunk not in self._inputs:  # the largest pass first: the others fit into its memory
                    largest = padded(most, num_patches, [(_STEP,) * (most // _STEP)] * len(lens), numbers)
                    self._inputs[trunk] = x_PD.new_zeros(most, x_PD.shape[1])
                    self._capture(trunk, most, x_PD[:0], largest, len(lens))
                result_MW = self._capture(trunk, size, x_PD, arrays, len(lens))
            except RuntimeError as error:
                logger.warning("The vision tower cannot be captured as CUDA graphs, so it runs without: %s", error)
                self._is_capturable = False
                return launch(trunk, x_PD, lens, numbers)
        else:
            return launch(trunk, x_PD, lens, numbers)
        return result_MW[: len(result_MW) * num_patches // size].clone()

    def _most(self, dtype: torch.dtype) -> int:
        """Patches of the largest graph."""
        return min(padded_size(self._max_patches), _MAX_FLOAT32 if dtype == torch.float32 else MAX_PATCHES)

    def _capture(
        self, trunk: Trunk, size: int, x_PD: torch.Tensor, arrays: Sequence[np.ndarray], num_tables: int
    ) -> torch.Tensor:
        """Run a pass from Python, and while the device is at it, record one for the next time."""
        if num_bytes(arrays) > len(self._packed):
            self._packed = torch.empty(num_bytes(arrays), dtype=torch.uint8, device=self._device)
        held_PD, packed = self._inputs[trunk][:size], self._packed
        held_PD[: len(x_PD)] = x_PD
        refill(packed, arrays)
        held = views(packed, arrays)
        segments = [Segments(ends_B1, None) for ends_B1 in held[:num_tables]]
        result_MW = trunk(held_PD, segments, held[num_tables:])
        if trunk not in self._results:
            self._results[trunk] = torch.empty_like(result_MW)
        kept_MW = self._results[trunk][: len(result_MW)]
        graph, _ = self._record(lambda: kept_MW.copy_(trunk(held_PD, segments, held[num_tables:])), warm_up=False)
        self._graphs.keep(_key(trunk, size, arrays), _Captured(graph, held_PD, packed, kept_MW))
        return result_MW


def _key(trunk: Trunk, size: int, arrays: Sequence[np.ndarray]) -> Hashable:
    """What a graph depends on."""
    return (trunk, size, *(len(array) for array in arrays))


def padded_size(num_patches: int) -> int:
    """The size of graph for a pass: in steps that matrix products hardly notice."""
    step = _STEP if num_patches <= 4096 else 2 * _STEP
    return -(-num_patches // step) * step


def padded(
    size: int, num_patches: int, lens: Sequence[Sequence[int]], numbers: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Tables of where segments end, then the numbers, as for ``size`` patches.

    What is added are one segment and, up to a power of two, empty ones.
    """
    tables: list[np.ndarray] = []
    for some in lens:
        room = _ROOM
        while room <= len(some):
            room *= 2
        table = np.full(room + 1, size, dtype=np.int32)
        table[: len(some) + 1] = ends(some)
        tables.append(table)
    for array in numbers:
        filled = np.zeros((size * len(array) // num_patches, *array.shape[1:]), dtype=array.dtype)
        filled[: len(array)] = array
        tables.append(filled)
    return tables
