"""The decoder's pass over one generated token per row, captured once per number of rows and replayed from then on.

Launching a few hundred kernels from Python takes tens of milliseconds; replaying them takes one call. What changes from
step to step lies in buffers that keep their place: one packed upload fills them, and everything derived from it,
the token ids included, is gathered on the device within the graph. Drawing tokens is not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.layers.staging import num_bytes, upload, views
from opsin.models.interface import VisionLanguageModel
from opsin.runner.inputs import RowNumbers, decode_arrays
from opsin.runner.slots import SlotTable


def sizes_up_to(max_rows: int) -> list[int]:
    """Numbers of rows to capture: doubling to 32, then in steps that waste an eighth or so."""
    sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128) if size < max_rows]
    sizes += list(range(160, max_rows, 32))
    return [*sizes, max_rows]


class _Captured(NamedTuple):
    """A graph, and the memory outside its pool that it reads; nothing else keeps that alive."""

    graph: torch.cuda.CUDAGraph
    packed: torch.Tensor
    starts_B1: torch.Tensor
    token_at_B: torch.Tensor
    hidden_BD: torch.Tensor


class DecodeGraphs:
    """Graphs for up to ``max_rows`` rows, all in one pool of memory, since they never run at the same time."""

    def __init__(
        self,
        model: VisionLanguageModel,
        caches: Sequence[LayerCache],
        table: SlotTable,
        block_size: int,
        max_rows: int,
    ) -> None:
        self._model = model
        self._caches = caches
        self._table = table
        self._block_size = block_size
        self._sizes = sizes_up_to(max_rows)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(table.tokens_SL.device)  # one, since cuBLAS keeps a workspace for each
        self._captured: dict[int, _Captured] = {}

    def capture_all(self) -> None:
        """Capture every size now, the largest first, so that the smaller ones fit into its memory."""
        for size in reversed(self._sizes):
            self._captured[size] = self._capture(size)

    def run(self, numbers: RowNumbers) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step for which ``numbers.is_decode`` holds.

        Returns:
            Hidden states (B, D) after the final norm, valid until the next run, and the flat places (B,) of the tokens
            that they draw.
        """
        num_rows = len(numbers.slot_B)
        size = next(size for size in self._sizes if size >= num_rows)
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._capture(size)
        arrays = decode_arrays(numbers, size, self._table, self._block_size)
        upload(arrays, captured.packed.device, into=captured.packed)
        captured.graph.replay()
        return captured.hidden_BD[:num_rows], captured.token_at_B[:num_rows]

    def _capture(self, size: int) -> _Captured:
        """Record the pass on rows that are all padding."""
        nobody = RowNumbers(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
        arrays = decode_arrays(nobody, size, self._table, self._block_size)
        device = self._table.tokens_SL.device
        packed = torch.empty(num_bytes(arrays), dtype=torch.uint8, device=device)
        at_B, token_at_B, positions_AB, slot_mapping_B, slot_B, context_B = views(packed, arrays)
        upload(arrays, device, into=packed)
        starts_B1 = torch.arange(size + 1, dtype=torch.int32, device=device)
        longest = self._table.tokens_SL.shape[1]

        def forward() -> torch.Tensor:
            attention = AttentionInputs(
                query_start_B1=starts_B1,
                context_lens_B=context_B,
                block_tables_BL=self._table.device_blocks_SL.index_select(0, slot_B),
                slot_mapping_T=slot_mapping_B,
                query_lens=(1,) * size,
                context_lens=(longest,) * size,
            )
            hidden_BD = self._model.embed(self._table.tokens_SL.view(-1)[at_B])
            return self._model.forward(hidden_BD, positions_AB, attention, self._caches)

        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            forward()  # compiles what is not compiled yet, and lets libraries allocate
            # Not torch.cuda.graph, which collects garbage and empties torch's cache first: half a second each time.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                hidden_BD = forward()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(self._stream)
        return _Captured(graph, packed, starts_B1, token_at_B, hidden_BD)
