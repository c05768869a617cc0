"""The sampler against plain arithmetic, one rule at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch

from opsin.layers import staging
from opsin.params import SamplingParams
from opsin.runner import sampler
from opsin.runner.sampler import (
    NUMBERS,
    ParticularRow,
    SampledTokens,
    SampleRows,
    _gumbel,
    _row_key,
    is_particular,
    logprob_lists,
    numbers_of,
)
from opsin.runner.sampler import sample as sample_rows

VOCAB = 50
STOP = 7


class Row(NamedTuple):
    slot: int
    num_tokens: int
    num_prompt: int
    seed: int
    stop: frozenset[int]
    params: SamplingParams


def row(tokens=(1, 2, 3), num_prompt=3, slot=0, seed=0, stop=frozenset(), **params) -> Row:
    return Row(slot, len(tokens), num_prompt, seed, frozenset(stop), SamplingParams(**params))


def sample(logits_BV: torch.Tensor, rows: Sequence[Row], tokens_SL: torch.Tensor) -> SampledTokens:
    asked = SampleRows(
        slot_B=np.array([row.slot for row in rows]),
        num_tokens_B=np.array([row.num_tokens for row in rows]),
        numbers_B=np.array([numbers_of(row.params, row.num_prompt, row.seed) for row in rows], NUMBERS),
        particular={
            b: ParticularRow(row.params, row.stop) for b, row in enumerate(rows) if is_particular(row.params, row.stop)
        },
    )
    return sample_rows(logits_BV, asked, tokens_SL)


def table(*sequences) -> torch.Tensor:
    tokens_SL = torch.zeros(len(sequences), 16, dtype=torch.int64)
    for slot, sequence in enumerate(sequences):
        tokens_SL[slot, : len(sequence)] = torch.tensor(sequence)
    return tokens_SL


def logits(batch=1, seed=0) -> torch.Tensor:
    return torch.randn(batch, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw_many(params: dict, logits_V: torch.Tensor, count=4000) -> torch.Tensor:
    rows = [row(seed=i, **params) for i in range(count)]
    ids = sample(logits_V.repeat(count, 1), rows, table((1, 2, 3))).ids_B
    return torch.bincount(ids, minlength=VOCAB) / count


def test_sample_temperature_zero_takes_argmax():
    x = logits(4)
    expected = x.argmax(-1)
    assert torch.equal(sample(x, [row(temperature=0)] * 4, table((1, 2, 3))).ids_B, expected)


def test_sample_temperature_one_follows_softmax():
    x = logits()[0] * 1.5
    frequency = draw_many({"temperature": 1.0}, x)
    assert (frequency - x.softmax(-1)).abs().max() < 0.03


def test_sample_low_temperature_sharpens():
    x = logits()[0]
    frequency = draw_many({"temperature": 0.5}, x)
    assert (frequency - (x / 0.5).softmax(-1)).abs().max() < 0.03


def test_sample_top_k_draws_from_the_k_best_only():
    x = logits()[0]
    frequency = draw_many({"top_k": 3}, x)
    kept = x.topk(3).indices
    expected = torch.zeros(VOCAB).index_copy(0, kept, x[kept].softmax(-1))
    assert (frequency - expected).abs().max() < 0.03
    assert int((frequency > 0).sum()) == 3


def test_sample_top_p_keeps_smallest_set_reaching_the_mass():
    p = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    x = torch.full((VOCAB,), -math.inf)
    x[:5] = p.log()
    assert draw_many({"top_p": 0.75}, x).nonzero().flatten().tolist() == [0, 1]
    assert draw_many({"top_p": 0.85}, x).nonzero().flatten().tolist() == [0, 1, 2]


def test_sample_min_p_drops_tokens_below_share_of_best():
    p = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    x = torch.full((VOCAB,), -math.inf)
    x[:5] = p.log()
    assert draw_many({"min_p": 0.15}, x).nonzero().flatten().tolist() == [0, 1, 2]


def test_sample_seeded_row_same_alone_and_in_any_batch():
    x = logits(5)
    tokens = table(*[(1, 2, 3)] * 5)
    rows = [row(slot=i, seed=100 + i, top_p=0.9, temperature=0.5 + i / 4) for i in range(5)]
    together = sample(x.clone(), rows, tokens).ids_B.tolist()
    alone = [sample(x[i : i + 1].clone(), [rows[i]], tokens).ids_B.item() for i in range(5)]
    mixed = sample(x.flip(0).clone(), rows[::-1], tokens).ids_B.tolist()
    assert together == alone == mixed[::-1]


def test_noise_depends_on_draw_index_and_seed():
    keys = torch.from_numpy(_row_key([1, 1, 2], [0, 1, 0]))
    a, b, c = _gumbel(keys[:, None], torch.arange(1000)[None])
    assert torch.isfinite(torch.stack([a, b, c])).all()
    for x, y in ((a, b), (a, c), (b, c)):
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.1
    assert abs(torch.cat([a, b, c]).mean() - 0.5772) < 0.06  # the Gumbel distribution's mean


def test_sample_repetition_penalty_divides_positive_and_multiplies_negative():
    x = logits()
    x[0, 1], x[0, 2] = 3.0, -1.0
    y = x.clone()
    sample(y, [row(temperature=0, repetition_penalty=2.0)], table((1, 2, 3)))
    assert y[0, 1] == 1.5
    assert y[0, 2] == -2.0
    assert torch.equal(y[0, 4:], x[0, 4:])


def test_sample_frequency_and_presence_penalties_count_the_answer_alone():
    x = logits()
    y = x.clone()
    tokens = (1, 2, 3, 5, 5, 6)
    sample(y, [row(tokens, 3, temperature=0, frequency_penalty=0.5, presence_penalty=0.25)], table(tokens))
    torch.testing.assert_close(y[0, 5], x[0, 5] - 2 * 0.5 - 0.25)
    torch.testing.assert_close(y[0, 6], x[0, 6] - 0.5 - 0.25)
    assert y[0, 1] == x[0, 1]


def test_sample_allowed_token_ids_restricts_to_them():
    x = logits()
    x[0, 9] = 50.0
    assert sample(x, [row(temperature=0, allowed_token_ids=[4, 8])], table((1, 2, 3))).ids_B.item() in (4, 8)


def test_sample_logit_bias_moves_one_token():
    x = logits()
    assert sample(x, [row(temperature=0, logit_bias={11: 100})], table((1, 2, 3))).ids_B.item() == 11


@pytest.mark.parametrize(
    ("words", "banned"), [([[9]], True), ([[2, 3, 9]], True), ([[3, 2, 9]], False), ([[1] * 9], False)]
)
def test_sample_bad_word_is_masked_after_its_prefix_only(words, banned):
    x = logits()
    x[0, 9] = 50.0
    drawn = sample(x, [row(temperature=0, bad_words_token_ids=words)], table((1, 2, 3))).ids_B.item()
    assert (drawn != 9) == banned


def test_sample_min_tokens_masks_stop_ids_until_reached():
    x = logits()
    x[0, STOP] = 50.0
    tokens = (1, 2, 3, 4)
    early = row(tokens, 3, stop=frozenset({STOP}), temperature=0, min_tokens=2)
    due = row(tokens, 2, stop=frozenset({STOP}), temperature=0, min_tokens=2)
    assert sample(x.clone(), [early], table(tokens)).ids_B.item() != STOP
    assert sample(x.clone(), [due], table(tokens)).ids_B.item() == STOP


def test_sample_nan_row_is_flagged_and_others_are_not():
    x = logits(3)
    x[1, 3] = math.nan
    assert sample(x, [row(temperature=0)] * 3, table((1, 2, 3))).drawn_2B[1].tolist() == [1, 0, 1]


def test_sample_logprobs_are_of_the_raw_logits():
    x = logits(2)
    raw = x.log_softmax(-1)
    rows = [row(temperature=0, logprobs=3, logit_bias={11: 100}), row(temperature=0)]
    drawn = sample(x, rows, table((1, 2, 3)))
    assert drawn.top is not None
    first, second = logprob_lists(drawn.top, drawn.ids_B.tolist(), [3, None])
    assert second is None
    assert first is not None
    assert first[0].token_id == 11
    assert first[0].logprob == pytest.approx(raw[0, 11].item(), abs=1e-6)
    assert first[0].rank == int((raw[0] > raw[0, 11]).sum()) + 1
    assert [entry.token_id for entry in first[1:]] == raw[0].topk(3).indices.tolist()


MANY = 400  # tokens, of which 64 are few
MIXED = [
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 3, "temperature": 0.5},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.01},
    {"top_k": 300, "top_p": 0.9},
    {"top_p": 0.7},
    {},
]


def mixed_draws() -> tuple[torch.Tensor, list[Row], torch.Tensor]:
    x = torch.randn(len(MIXED), MANY, generator=torch.Generator().manual_seed(1))
    return x, [row(slot=i, seed=i, **params) for i, params in enumerate(MIXED)], table(*[(1, 2, 3)] * len(MIXED))


def test_sample_rows_of_every_kind_together_equal_each_alone():
    x, rows, tokens = mixed_draws()
    together = sample(x.clone(), rows, tokens).ids_B.tolist()
    assert together == [sample(x[i : i + 1].clone(), [row], tokens).ids_B.item() for i, row in enumerate(rows)]
    assert together[:2] == x[:2].argmax(-1).tolist()


def test_sample_among_candidates_equals_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch):
    x, rows, tokens = mixed_draws()
    few = [sample(x.clone(), [r._replace(seed=seed) for r in rows], tokens).ids_B.tolist() for seed in range(50)]
    monkeypatch.setattr(sampler, "_MAX_NARROW", 0)
    all_ = [sample(x.clone(), [r._replace(seed=seed) for r in rows], tokens).ids_B.tolist() for seed in range(50)]
    assert few == all_
    assert len({tuple(ids) for ids in few}) > 1


def test_sample_keeps_tokens_as_likely_as_the_last_one_kept():
    x = torch.zeros(1, MANY)
    x[0, [7, 30, 200]] = 5.0
    drawn = {sample(x.clone(), [row(seed=seed, top_k=2)], table((1, 2, 3))).ids_B.item() for seed in range(40)}
    assert drawn == {7, 30, 200}


def test_sample_keeps_a_token_where_top_p_is_less_than_any_token_has():
    x, _, tokens = mixed_draws()
    asked = [row(slot=i, seed=i, top_p=1e-6) for i in range(len(x))]
    assert sample(x.clone(), asked, tokens).ids_B.tolist() == x.argmax(-1).tolist()


def test_sample_draws_the_same_where_its_numbers_travel_packed(monkeypatch: pytest.MonkeyPatch):
    """As they do to a GPU: columns of records, of several dtypes, behind one another in one piece of memory."""
    asked = [*MIXED, {"repetition_penalty": 1.3, "presence_penalty": 0.4}, {"logit_bias": {3: 2.0, 5: -1.0}}]
    x = torch.randn(len(asked), MANY, generator=torch.Generator().manual_seed(2))
    rows = [row(slot=i, seed=i, **params) for i, params in enumerate(asked)]
    tokens = table(*[(1, 2, 3)] * len(asked))

    def packed(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
        memory = torch.empty(staging.num_bytes(arrays), dtype=torch.uint8)
        return staging.upload(arrays, device, into=memory)

    expected = sample(x.clone(), rows, tokens).ids_B
    monkeypatch.setattr(sampler, "upload", packed)
    assert torch.equal(sample(x.clone(), rows, tokens).ids_B, expected)
