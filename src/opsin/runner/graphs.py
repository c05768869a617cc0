"""The decoder's pass, captured once per size and replayed from then on: steps that only decode, and most others.

Launching a few hundred kernels from Python takes tens of milliseconds; replaying them takes one call. What changes from
step to step lies in buffers that keep their place: one packed upload fills them. Sizes are rounded up to few, with rows
and tokens that write to the scratch block and that nobody reads. Drawing tokens is not part of it.

Decode steps are captured at the start. Other sizes are captured when a step first has them, which costs the host little
more than launching that step would.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.layers.staging import num_bytes, refill, views
from opsin.models.interface import VisionLanguageModel
from opsin.runner.inputs import RowNumbers, StepArrays, decode_arrays, padded
from opsin.runner.kept import Graph, Record
from opsin.runner.slots import SlotTable

logger = logging.getLogger(__name__)

MAX_TOKENS = 4096  # a larger step keeps the device busier than Python, and what pads it would be computed for nothing
_FEW_ROWS = 16  # up to which steps have graphs of their own: what pads them costs attention programs that do nothing


def decode_sizes(max_rows: int) -> list[int]:
    """Numbers of rows to capture: doubling to 16, then in steps that waste an eighth or so."""
    sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128) if size < max_rows]
    sizes += list(range(160, max_rows, 32))
    return [*sizes, max_rows]


def prefill_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens to capture: in steps that matrix products hardly notice."""
    most = min(max_tokens, MAX_TOKENS)
    ranges = ((64, 1024, 64), (1024, most, 128))
    return [*(size for each in ranges for size in range(*each) if size < most), most]


class _Captured(NamedTuple):
    """A graph, and the memory outside its pool that it reads; nothing else keeps that alive."""

    graph: Graph
    packed: torch.Tensor
    inputs: list[torch.Tensor]
    starts: torch.Tensor
    hidden: torch.Tensor


class Recorder:
    """Captures graphs that never run at the same time, so that all can use one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # one, since cuBLAS keeps a workspace for each

    def record(self, work: Callable[[], torch.Tensor], *, warm_up: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Capture some work.

        Args:
            warm_up: run it once before, which compiles what is not compiled yet, and lets libraries allocate.

        Returns:
            The graph, and where each replay leaves its result until another graph of this recorder is replayed.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if warm_up:
                work()
            # Not torch.cuda.graph, which collects garbage and empties torch's cache first: half a second each time.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph, result


class StepGraphs:
    """Graphs of one decoder over one cache."""

    def __init__(
        self,
        model: VisionLanguageModel,
        caches: Sequence[LayerCache],
        table: SlotTable,
        *,
        block_size: int,
        max_rows: int,
        max_tokens: int,
        dtype: torch.dtype,
        record: Record,
    ) -> None:
        self._model = model
        self._caches = caches
        self._table = table
        self._block_size = block_size
        self._device = table.tokens_SL.device
        self._decode_sizes = decode_sizes(max_rows)
        self._row_sizes = sorted({min(_FEW_ROWS, max_rows) + 1, max_rows + 1})  # of which one pads
        self._prefill_sizes = prefill_sizes(max_tokens)
        width = model.spec.hidden_size
        # One for all sizes: each step is done with them before the next one.
        shape = (2, self._prefill_sizes[-1], width)
        self._embedded_TD, self._hidden_TD = torch.zeros(shape, dtype=dtype, device=self._device)
        extra = model.spec.feature_width - width
        self._extra_TE = torch.zeros(shape[1], extra, dtype=dtype, device=self._device) if extra else None
        self._record = record
        self._decode: dict[int, _Captured] = {}
        self._prefill: dict[tuple[int, int], _Captured] = {}  # by numbers of tokens and rows
        self._captures_more = True

    def capture_first(self) -> None:
        """Capture decode steps, and before them the largest step that there can be: the others fit into its memory."""
        largest = (self._prefill_sizes[-1], self._row_sizes[-1])
        self._prefill[largest] = self._capture_prefill(*largest, warm_up=True)
        for size in reversed(self._decode_sizes):
            self._decode[size] = self._capture_decode(size)

    def decode(self, numbers: RowNumbers) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step for which ``numbers.is_decode`` holds.

        Returns:
            Hidden states (B, D) after the final norm, valid until the next run, and the flat places (B,) of the tokens
            that they draw.
        """
        num_rows = len(numbers.slot_B)
        size = self._decode_sizes[bisect_left(self._decode_sizes, num_rows)]
        captured = self._decode[size]
        refill(captured.packed, decode_arrays(numbers, size, self._table, self._block_size))
        captured.graph.replay()
        return captured.hidden[:num_rows], captured.inputs[1][:num_rows]

    def covers(self, arrays: StepArrays) -> bool:
        """``prefill`` can run this step: its size has been captured, or now is."""
        return self._size_for(arrays) is not None

    def _size_for(self, arrays: StepArrays) -> tuple[int, int] | None:
        """Tokens and rows of the graph for a step, captured by now."""
        num_tokens, num_rows = len(arrays.at_T), len(arrays.slot_B) + 1
        if num_tokens > self._prefill_sizes[-1]:
            return None
        size = (
            self._prefill_sizes[bisect_left(self._prefill_sizes, num_tokens)],
            self._row_sizes[bisect_left(self._row_sizes, num_rows)],
        )
        if size not in self._prefill and self._captures_more:
            try:
                self._prefill[size] = self._capture_prefill(*size, warm_up=False)
            except RuntimeError as error:  # no memory, above all: larger graphs do, if there are any
                logger.warning("No more steps are captured as CUDA graphs: %s", error)
                self._captures_more = False
        if size in self._prefill:
            return size
        return min((kept for kept in self._prefill if kept[0] >= num_tokens and kept[1] >= num_rows), default=None)

    def prefill(
        self, arrays: StepArrays, fill: Callable[[torch.Tensor, torch.Tensor | None], None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run a step that is covered, of any rows that see nothing but what is before them.

        Args:
            fill: puts features in place, in the (T, D) embeddings of the step's tokens, and where there are columns
                for deeper layers, in (T, E) zeros.

        Returns:
            Hidden states (T, D) after the final norm, valid until the next run; ``emit_index_E`` and ``token_at_E``.
        """
        num_tokens, num_emitting = len(arrays.at_T), len(arrays.emit_index_E)
        found = self._size_for(arrays)
        assert found is not None, "the step is not covered"
        captured, (size, _) = self._prefill[found], found
        refill(captured.packed, padded(arrays, *found))
        at_T, _, _, _, emit_index_E, token_at_E, _, _ = captured.inputs
        self._embedded_TD[:size] = self._model.embed(self._table.tokens_SL.view(-1)[at_T])
        extra_TE = None if self._extra_TE is None else self._extra_TE[:size].zero_()[:num_tokens]
        fill(self._embedded_TD[:num_tokens], extra_TE)
        captured.graph.replay()
        return captured.hidden[:num_tokens], emit_index_E[:num_emitting], token_at_E[:num_emitting]

    def _capture_decode(self, size: int) -> _Captured:
        """Record the pass on rows that are all padding."""
        nobody = RowNumbers(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
        arrays = decode_arrays(nobody, size, self._table, self._block_size)
        packed = torch.empty(num_bytes(arrays), dtype=torch.uint8, device=self._device)
        inputs = views(packed, arrays)
        at_B, _, positions_AB, slot_mapping_B, slot_B, context_B = inputs
        refill(packed, arrays)
        starts_B1 = torch.arange(size + 1, dtype=torch.int32, device=self._device)
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

        graph, hidden = self._record(forward, warm_up=True)
        return _Captured(graph, packed, inputs, starts_B1, hidden)

    def _capture_prefill(self, size: int, num_rows: int, *, warm_up: bool) -> _Captured:
        """Record the pass on tokens that are all padding."""
        nothing = np.zeros(0, dtype=np.int64)
        arrays = padded(
            StepArrays(
                at_T=nothing,
                positions_AT=np.zeros((self._table.num_axes, 0), dtype=np.int64),
                slot_mapping_T=nothing,
                slot_B=nothing,
                emit_index_E=nothing,
                token_at_E=nothing,
                query_start_B1=np.zeros(1, dtype=np.int32),
                context_B=np.zeros(0, dtype=np.int32),
            ),
            size,
            num_rows,
        )
        packed = torch.empty(num_bytes(arrays), dtype=torch.uint8, device=self._device)
        inputs = views(packed, arrays)
        refill(packed, arrays)
        _, positions_AT, slot_mapping_T, slot_B, _, _, query_start_B1, context_B = inputs
        longest = self._table.tokens_SL.shape[1]

        def forward() -> torch.Tensor:
            attention = AttentionInputs(
                query_start_B1=query_start_B1,
                context_lens_B=context_B,
                block_tables_BL=self._table.device_blocks_SL.index_select(0, slot_B),
                slot_mapping_T=slot_mapping_T,
                # Some rows may have one token. No less than 2 for others: that all have one would not be true of these.
                query_lens=(1, *(max(size, 2),) * (num_rows - 1)),
                context_lens=(longest,) * num_rows,
            )
            # A copy, since the pass may work in place.
            embedded_TD = self._embedded_TD[:size].clone()
            extra_TE = None if self._extra_TE is None else self._extra_TE[:size]
            hidden_TD = self._model.forward(embedded_TD, positions_AT, attention, self._caches, extra_TE)
            return self._hidden_TD[:size].copy_(hidden_TD)

        graph, hidden = self._record(forward, warm_up=warm_up)
        return _Captured(graph, packed, inputs, query_start_B1, hidden)
