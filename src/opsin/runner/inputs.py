"""A step's rows as the flat tensors that the decoder runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from opsin.kernels.inputs import AttentionInputs
from opsin.runner.slots import SlotTable
from opsin.types import RowPlan


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, ready for the device.

    Attributes:
        ids_T: token ids, placeholders included.
        positions_AT: rotary positions.
        row_starts: flat index of each row's first token.
        emit_index_E: flat index of the last token of each row that emits.
    """

    ids_T: torch.Tensor
    positions_AT: torch.Tensor
    attention: AttentionInputs
    row_starts: Sequence[int]
    emit_index_E: torch.Tensor


def build_inputs(rows: Sequence[RowPlan], table: SlotTable, block_size: int) -> StepInputs:
    """Assemble a step's inputs on the host and move them to the token table's device.

    Rows' new blocks must have been appended to the table.
    """
    device = table.tokens_SL.device
    slot_B = np.array([row.slot for row in rows], dtype=np.int64)
    start_B = np.array([row.start for row in rows], dtype=np.int64)
    len_B = np.array([row.num_tokens for row in rows], dtype=np.int64)
    query_start_B1 = np.concatenate(([0], np.cumsum(len_B)))
    num_tokens = int(query_start_B1[-1])
    context_B = start_B + len_B

    slot_T = np.repeat(slot_B, len_B)
    index_T = np.arange(num_tokens) - np.repeat(query_start_B1[:-1] - start_B, len_B)  # index within the sequence
    block_T = table.blocks_SL[slot_T, index_T // block_size].astype(np.int64)
    slot_mapping_T = block_T * block_size + index_T % block_size
    num_columns = -(-int(context_B.max()) // block_size)
    block_tables_BL = table.blocks_SL[slot_B, :num_columns]
    # Columns past a row's own blocks may hold a former tenant's ids; point them at the scratch block.
    held_B = -(-context_B // block_size)
    block_tables_BL = np.where(np.arange(num_columns) < held_B[:, None], block_tables_BL, 0)
    emit_E = query_start_B1[1:][np.array([row.emits for row in rows], dtype=bool)] - 1

    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    flat_index_T = to_device(slot_T * table.tokens_SL.shape[1] + index_T)
    visible = _visible(rows, table, index_T, query_start_B1)
    attention = AttentionInputs(
        query_start_B1=to_device(query_start_B1.astype(np.int32)),
        context_lens_B=to_device(context_B.astype(np.int32)),
        block_tables_BL=to_device(block_tables_BL),
        slot_mapping_T=to_device(slot_mapping_T),
        query_lens=tuple(len_B.tolist()),
        context_lens=tuple(context_B.tolist()),
        visible_end_T=None if visible is None else to_device(visible.end_T),
        visible_begin_T=None if visible is None else to_device(visible.begin_T),
    )
    return StepInputs(
        ids_T=table.tokens_SL.view(-1)[flat_index_T],
        positions_AT=to_device(_positions(rows, table, index_T, query_start_B1)),
        attention=attention,
        row_starts=query_start_B1[:-1].tolist(),
        emit_index_E=to_device(emit_E),
    )


def _positions(
    rows: Sequence[RowPlan], table: SlotTable, index_T: np.ndarray, query_start_B1: np.ndarray
) -> np.ndarray:
    """int64 (A, T): the index in the sequence, unless the family's rule said otherwise."""
    positions_AT = np.repeat(index_T[None], table.num_axes, axis=0)
    for b, row in enumerate(rows):
        slot = table[row.slot]
        if slot.positions_AP is None:
            continue
        columns = positions_AT[:, query_start_B1[b] : query_start_B1[b + 1]]
        columns += slot.position_delta
        in_prompt = max(0, min(row.start + row.num_tokens, slot.num_prompt_tokens) - row.start)
        if in_prompt:
            columns[:, :in_prompt] = slot.positions_AP[:, row.start : row.start + in_prompt]
    return positions_AT


class _Visible(NamedTuple):
    """int32: where each token's view ends, and where it begins at the latest, whatever a layer's window."""

    begin_T: np.ndarray
    end_T: np.ndarray


def _visible(
    rows: Sequence[RowPlan], table: SlotTable, index_T: np.ndarray, query_start_B1: np.ndarray
) -> _Visible | None:
    """The views of a step's tokens, if any token is in a range whose tokens see one another."""
    visible = None
    for b, row in enumerate(rows):
        end = row.start + row.num_tokens
        for span_start, span_end in table[row.slot].bidirectional:
            if span_start >= end or span_end <= row.start:
                continue
            assert row.start <= span_start, "a chunk begins inside a bidirectional range"
            assert span_end <= end, "a chunk ends inside a bidirectional range"
            if visible is None:
                visible = _Visible(index_T.astype(np.int32), (index_T + 1).astype(np.int32))
            first = query_start_B1[b] - row.start
            visible.begin_T[first + span_start : first + span_end] = span_start
            visible.end_T[first + span_start : first + span_end] = span_end
    return visible
