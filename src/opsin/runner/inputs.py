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


class StepArrays(NamedTuple):
    """A step's inputs on the host, in the order in which they are uploaded; the integers are int64 where not said.

    Attributes:
        at_T: flat places of the tokens in the token table.
        positions_AT: rotary positions.
        slot_mapping_T: where each token's key and value go.
        slot_B: each row's slot.
        emit_index_E: flat index of the last token of each row that emits.
        token_at_E: where in the flat token table the token that it draws belongs.
        query_start_B1: int32, as in ``AttentionInputs``.
        context_B: int32, likewise.
    """

    at_T: np.ndarray
    positions_AT: np.ndarray
    slot_mapping_T: np.ndarray
    slot_B: np.ndarray
    emit_index_E: np.ndarray
    token_at_E: np.ndarray
    query_start_B1: np.ndarray
    context_B: np.ndarray


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, ready for the device: what of ``StepArrays`` is not in ``attention``, with the ids themselves."""

    ids_T: torch.Tensor
    positions_AT: torch.Tensor
    attention: AttentionInputs
    emit_index_E: torch.Tensor
    token_at_E: torch.Tensor


def step_arrays(rows: Sequence[RowPlan], numbers: RowNumbers, table: SlotTable, block_size: int) -> StepArrays:
    """Assemble a step's inputs on the host."""
    slot_B, start_B, len_B, emits_B = numbers
    query_start_B1 = np.concatenate(([0], np.cumsum(len_B)))
    context_B = start_B + len_B
    slot_T = np.repeat(slot_B, len_B)
    # Of each token the index within its sequence.
    index_T = np.arange(query_start_B1[-1]) - np.repeat(query_start_B1[:-1] - start_B, len_B)
    row_length = table.tokens_SL.shape[1]
    return StepArrays(
        at_T=slot_T * row_length + index_T,
        positions_AT=_positions(rows, numbers, table, slot_T, index_T, query_start_B1),
        slot_mapping_T=_slot_mapping(table, slot_T, index_T, block_size),
        slot_B=slot_B,
        emit_index_E=query_start_B1[1:][emits_B] - 1,
        token_at_E=(slot_B * row_length + context_B)[emits_B],
        query_start_B1=query_start_B1.astype(np.int32),
        context_B=context_B.astype(np.int32),
    )


def build_inputs(
    arrays: StepArrays, views: Views | None, numbers: RowNumbers, table: SlotTable, block_size: int
) -> StepInputs:
    """Move a step's inputs to the token table's device, whose block table must be up to date (``update_blocks``)."""
    at_T, positions_AT, slot_mapping_T, slots, emit_E, token_at_E, query_start, context, *ranges = upload(
        [*arrays, *(views or ())], table.tokens_SL.device
    )
    num_columns = -(-int(arrays.context_B.max()) // block_size)
    attention = AttentionInputs(
        query_start_B1=query_start,
        context_lens_B=context,
        block_tables_BL=table.device_blocks_SL[:, :num_columns].index_select(0, slots),
        slot_mapping_T=slot_mapping_T,
        query_lens=tuple(numbers.len_B.tolist()),
        context_lens=tuple(arrays.context_B.tolist()),
        visible_begin_T=ranges[0] if ranges else None,
        visible_end_T=ranges[1] if ranges else None,
    )
    return StepInputs(
        ids_T=table.tokens_SL.view(-1)[at_T],
        positions_AT=positions_AT,
        attention=attention,
        emit_index_E=emit_E,
        token_at_E=token_at_E,
    )


def update_blocks(table: SlotTable) -> None:
    """Bring the device's block table up to date."""
    new = table.take_new_blocks()
    if new is not None:
        places, blocks = upload(new, table.device_blocks_SL.device)
        table.device_blocks_SL.view(-1).index_copy_(0, places, blocks)


def padded(arrays: StepArrays, num_tokens: int, num_rows: int) -> StepArrays:
    """The same step with ``num_tokens`` tokens and ``num_rows`` rows.

    One row, the last, takes all tokens that are added; it writes them to the scratch block. The other new rows are
    empty. No new row has a context, so none looks up any block, whatever its slot, and however many tokens it has. What
    belongs to emitting rows becomes one entry per row, of which the first are the real ones.
    """
    extra_rows = num_rows - len(arrays.slot_B)
    assert num_tokens >= len(arrays.at_T)
    assert extra_rows >= 1
    ends = np.full(extra_rows, len(arrays.at_T), dtype=np.int32)
    ends[-1] = num_tokens
    return StepArrays(
        at_T=_lengthened(arrays.at_T, num_tokens),
        positions_AT=_lengthened(arrays.positions_AT, num_tokens),
        slot_mapping_T=_lengthened(arrays.slot_mapping_T, num_tokens),
        slot_B=_lengthened(arrays.slot_B, num_rows),
        emit_index_E=_lengthened(arrays.emit_index_E, num_rows),
        token_at_E=_lengthened(arrays.token_at_E, num_rows),
        query_start_B1=np.concatenate((arrays.query_start_B1, ends)),
        context_B=_lengthened(arrays.context_B, num_rows),
    )


def _lengthened(array: np.ndarray, length: int) -> np.ndarray:
    longer = np.zeros((*array.shape[:-1], length), array.dtype)  # np.pad takes ten times as long
    longer[..., : array.shape[-1]] = array
    return longer


def decode_arrays(numbers: RowNumbers, num_rows: int, table: SlotTable, block_size: int) -> list[np.ndarray]:
    """Inputs of a step of one generated token per row, padded to ``num_rows`` rows.

    Returns:
        Flat places of the tokens in the token table, and of those that they draw; rotary positions (A, B); slot
        mapping; slots; context lengths. Rows that pad have no context, and write to the scratch block.
    """
    slot_B, start_B = numbers.slot_B, numbers.start_B
    at_B = slot_B * table.tokens_SL.shape[1] + start_B
    columns = [
        at_B,
        at_B + 1,
        np.repeat((start_B + table.delta_S[slot_B])[None], table.num_axes, axis=0),
        _slot_mapping(table, slot_B, start_B, block_size),
        slot_B,
        (start_B + 1).astype(np.int32),
    ]
    return columns if len(slot_B) == num_rows else [_lengthened(column, num_rows) for column in columns]


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


class Views(NamedTuple):
    """int32: where each token's view ends, and where it begins at the latest, whatever a layer's window."""

    begin_T: np.ndarray
    end_T: np.ndarray


def views_of(rows: Sequence[RowPlan], numbers: RowNumbers, table: SlotTable, arrays: StepArrays) -> Views | None:
    """The views of a step's tokens, if any token is in a range whose tokens see one another."""
    views = None
    for b in _in_prompt(numbers, table):
        row = rows[b]
        end = row.start + row.num_tokens
        for span_start, span_end in table[row.slot].bidirectional:
            if span_start >= end or span_end <= row.start:
                continue
            assert row.start <= span_start, "a chunk begins inside a bidirectional range"
            assert span_end <= end, "a chunk ends inside a bidirectional range"
            if views is None:
                index_T = arrays.at_T % table.tokens_SL.shape[1]
                views = Views(index_T.astype(np.int32), (index_T + 1).astype(np.int32))
            first = arrays.query_start_B1[b] - row.start
            views.begin_T[first + span_start : first + span_end] = span_start
            views.end_T[first + span_start : first + span_end] = span_end
    return views
