"""The sampler against plain arithmetic, one rule at a time."""

from __future__ import annotations

import math

import pytest
import torch

from opsin.params import SamplingParams
from opsin.runner.sampler import SampleRow, _gumbel, _row_key, logprob_lists, sample

VOCAB = 50
STOP = 7


def row(tokens=(1, 2, 3), num_prompt=3, slot=0, seed=0, stop=frozenset(), **params) -> SampleRow:
    return SampleRow(slot, len(tokens), num_prompt, SamplingParams(**params), seed, frozenset(stop))


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
    keys = torch.tensor([_row_key(1, 0), _row_key(1, 1), _row_key(2, 0)])
    a, b, c = _gumbel(keys, 1000)
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
    assert sample(x, [row(temperature=0)] * 3, table((1, 2, 3))).finite_B.tolist() == [True, False, True]


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
