"""Steps that only decode: which they are, what pads them, and which of their rows need no look."""

from __future__ import annotations

import pytest
import torch

from opsin.params import SamplingParams
from opsin.runner.inputs import RowNumbers, decode_arrays
from opsin.runner.slots import SlotTable
from opsin.types import RowPlan, SlotOpen

BLOCK_SIZE, MAX_LEN, NUM_SLOTS = 4, 40, 3


@pytest.fixture
def table() -> SlotTable:
    table = SlotTable(
        max_num_seqs=NUM_SLOTS, max_model_len=MAX_LEN, block_size=BLOCK_SIZE, num_axes=2, device=torch.device("cpu")
    )
    for slot, (length, blocks) in enumerate([(6, (3, 4)), (9, (5, 6, 7)), (1, (8,))]):
        greedy = SamplingParams(temperature=0)
        table.open(SlotOpen(slot, list(range(length)), length, greedy, 0, None, 0, [], frozenset()))
        table.append_blocks(slot, blocks)
    return table


def test_padded_decode_rows_have_no_context(table: SlotTable):
    rows = [RowPlan(1, 9, 1, (), True), RowPlan(0, 6, 1, (), True)]
    numbers = RowNumbers.of(rows)
    assert numbers.is_decode(table)
    at, token_at, positions, slot_mapping, slots, contexts = decode_arrays(numbers, 4, table, BLOCK_SIZE)
    assert at.tolist()[:2] == [MAX_LEN + 1 + 9, 6]
    assert token_at.tolist()[:2] == [MAX_LEN + 1 + 10, 7]
    assert positions.tolist() == [[9, 6, 0, 0]] * 2
    assert slot_mapping.tolist() == [7 * BLOCK_SIZE + 1, 4 * BLOCK_SIZE + 2, 0, 0]
    assert slots.tolist()[:2] == [1, 0]
    assert contexts.tolist() == [10, 7, 0, 0]


def test_a_prompt_s_last_token_alone_is_no_decode_row(table: SlotTable):
    assert not RowNumbers.of([RowPlan(2, 0, 1, (), True)]).is_decode(table)
    assert not RowNumbers.of([RowPlan(1, 9, 1, (), True), RowPlan(0, 0, 6, (), True)]).is_decode(table)


def test_a_request_asking_for_more_than_the_likeliest_token_is_not_plain(table: SlotTable):
    assert table.is_plain_S.tolist() == [True] * NUM_SLOTS
    for params in (
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=0, logprobs=1),
        SamplingParams(temperature=0, repetition_penalty=1.1),
        SamplingParams(temperature=0, logit_bias={1: 2.0}),
        SamplingParams(temperature=0, min_tokens=2),
    ):
        table.open(SlotOpen(0, [1], 1, params, 0, None, 0, [], frozenset({9})))
        assert not table.is_plain_S[0], params
