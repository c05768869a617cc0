"""A step's rows as the flat tensors that the decoder runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from opsin.kernels.inputs import AttentionInputs
from opsin.layers.staging import upload
from opsin.runner.slots import SlotTable
from opsin.types import RowPlan


class RowNumbers(NamedTuple):
    """The rows of a step in int64 columns: slot, first position, number of tokens; and whether they emit."""

    slot_B: np.ndarray
    start_B: np.ndarray
    len_B: np.ndarray
    emits_B: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[RowPlan]) -> RowNumbers:
        return cls(
            np.array([row.slot for row in rows], dtype=np.int64),
            np.array([row.start for row in rows], dtype=np.int64),
            np.array([row.num_tokens for row in rows], dtype=np.int64),
            np.array([row.emits for row in rows], dtype=bool),
        )

    def is_decode(self, table: SlotTable) -> bool:
        """Every row runs one generated token, and draws the next one."""
        past_prompt = self.start_B >= table.num_prompt_S[self.slot_B]
        return bool(past_prompt.all() and (self.len_B == 1).all() and self.emits_B.all())


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, ready for the device.

    Attributes:
        ids_T: token ids, placeholders included.
        positions_AT: rotary positions.
        row_starts: flat index of each row's first token.
        emit_index_E: flat index of the last token of each row that emits.
        token_at_E: where in the flat token table the token that it draws belongs.
    """

    ids_T: torch.Tensor
    positions_AT: torch.Tensor
    attention: AttentionInputs
    row_starts: Sequence[int]
    emit_index_E: torch.Tensor
    token_at_E: torch.Tensor


def build_inputs(rows: Sequence[RowPlan], numbers: RowNumbers, table: SlotTable, block_size: int) -> StepInputs:
    """Assemble a step's inputs on the host and move them to the token table's device.

    The device's block table must be up to date (``update_blocks``).
    """
    slot_B, start_B, len_B, emits_B = numbers
    query_start_B1 = np.concatenate(([0], np.cumsum(len_B)))
    num_tokens = int(query_start_B1[-1])
    context_B = start_B + len_B
    slot_T = np.repeat(slot_B, len_B)
    index_T = np.arange(num_tokens) - np.repeat(query_start_B1[:-1] - start_B, len_B)  # index within the sequence
    row_length = table.tokens_SL.shape[1]
    arrays = [
        slot_T * row_length + index_T,
        _positions(rows, numbers, table, slot_T, index_T, query_start_B1),
        _slot_mapping(table, slot_T, index_T, block_size),
        slot_B,
        query_start_B1[1:][emits_B] - 1,
        (slot_B * row_length + context_B)[emits_B],
        query_start_B1.astype(np.int32),
        context_B.astype(np.int32),
    ]
    visible = _visible(rows, numbers, table, index_T, query_start_B1)
    if visible is not None:
        arrays += [visible.begin_T, visible.end_T]
    flat_T, positions_AT, slot_mapping_T, slots, emit_E, token_at_E, query_start, context, *views = upload(
        arrays, table.tokens_SL.device
    )
    num_columns = -(-int(context_B.max()) // block_size)
    attention = AttentionInputs(
        query_start_B1=query_start,
        context_lens_B=context,
        block_tables_BL=table.device_blocks_SL[:, :num_columns].index_select(0, slots),
        slot_mapping_T=slot_mapping_T,
        query_lens=tuple(len_B.tolist()),
        context_lens=tuple(context_B.tolist()),
        visible_begin_T=views[0] if views else None,
        visible_end_T=views[1] if views else None,
    )
    return StepInputs(
        ids_T=table.tokens_SL.view(-1)[flat_T],
        positions_AT=positions_AT,
        attention=attention,
        row_starts=query_start_B1[:-1].tolist(),
        emit_index_E=emit_E,
        token_at_E=token_at_E,
    )


def update_blocks(table: SlotTable) -> None:
    """Bring the device's block table up to date."""
    new = table.take_new_blocks()
    if new is not None:
        places, blocks = upload(new, table.device_blocks_SL.device)
        table.device_blocks_SL.view(-1).index_copy_(0, places, blocks)


def decode_arrays(numbers: RowNumbers, num_rows: int, table: SlotTable, block_size: int) -> list[np.ndarray]:
    """Inputs of a step of one generated token per row, padded to ``num_rows`` rows.

    Returns:
        Flat places of the tokens in the token table, and of those that they draw; rotary positions (A, B); slot
        mapping; slots; context lengths. Rows that pad have no context, and write to the scratch block.
    """
    slot_B, start_B = numbers.slot_B, numbers.start_B
    at_B = slot_B * table.tokens_SL.shape[1] + start_B
    positions_AB = np.repeat((start_B + table.delta_S[slot_B])[None], table.num_axes, axis=0)
    columns = [
        at_B,
        at_B + 1,
        positions_AB,
        _slot_mapping(table, slot_B, start_B, block_size),
        slot_B,
        (start_B + 1).astype(np.int32),
    ]
    missing = num_rows - len(slot_B)
    if not missing:
        return columns
    return [np.pad(column, [(0, 0)] * (column.ndim - 1) + [(0, missing)]) for column in columns]


def _slot_mapping(table: SlotTable, slot_T: np.ndarray, index_T: np.ndarray, block_size: int) -> np.ndarray:
    block_T = table.blocks_SL[slot_T, index_T // block_size].astype(np.int64)
    return block_T * block_size + index_T % block_size


def _positions(
    rows: Sequence[RowPlan],
    numbers: RowNumbers,
    table: SlotTable,
    slot_T: np.ndarray,
    index_T: np.ndarray,
    query_start_B1: np.ndarray,
) -> np.ndarray:
    """int64 (A, T): the index in the sequence, unless the family's rule said otherwise."""
    positions_AT = np.repeat((index_T + table.delta_S[slot_T])[None], table.num_axes, axis=0)
    for b in _in_prompt(numbers, table):
        row, slot = rows[b], table[rows[b].slot]
        if slot.positions_AP is not None:
            columns = positions_AT[:, query_start_B1[b] : query_start_B1[b + 1]]
            known = slot.positions_AP[:, row.start : row.start + row.num_tokens]
            columns[:, : known.shape[1]] = known
    return positions_AT


def _in_prompt(numbers: RowNumbers, table: SlotTable) -> list[int]:
    """The rows that begin in their prompt; none later is anything but one token after another."""
    return np.flatnonzero(numbers.start_B < table.num_prompt_S[numbers.slot_B]).tolist()


class _Visible(NamedTuple):
    """int32: where each token's view ends, and where it begins at the latest, whatever a layer's window."""

    begin_T: np.ndarray
    end_T: np.ndarray


def _visible(
    rows: Sequence[RowPlan], numbers: RowNumbers, table: SlotTable, index_T: np.ndarray, query_start_B1: np.ndarray
) -> _Visible | None:
    """The views of a step's tokens, if any token is in a range whose tokens see one another."""
    visible = None
    for b in _in_prompt(numbers, table):
        row = rows[b]
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
