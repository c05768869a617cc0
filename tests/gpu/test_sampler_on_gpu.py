"""Drawing tokens on a CUDA device waits for nothing: the host goes on to plan the next step while this one runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin.params import SamplingParams
from opsin.runner.sampler import NUMBERS, ParticularRow, SampleRows, numbers_of, sample
from tests.gpu.waiting import waiting_refused

pytestmark = pytest.mark.gpu

VOCAB = 1000
ASKED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=50, min_p=0.01, logprobs=2),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
    SamplingParams(logit_bias={3: 1.0}, allowed_token_ids=[1, 2, 3], bad_words_token_ids=[[1], [4, 2]]),
    SamplingParams(min_tokens=8),
]


@pytest.mark.parametrize("params", ASKED, ids=str)
def test_sample_does_not_wait_for_the_device(params: SamplingParams) -> None:
    table = torch.ones(2, 16, dtype=torch.int64, device="cuda")
    asked = ParticularRow(params, frozenset({7}), mask=b"\xff" * 128)
    numbers = np.array([numbers_of(params, 4, seed) for seed in range(2)], NUMBERS)
    rows = SampleRows(np.arange(2), np.full(2, 6), numbers, {0: asked, 1: asked})
    logits = torch.randn(2, VOCAB, device="cuda")
    sample(logits.clone(), rows, table)  # libraries may wait where they are used first
    with waiting_refused():
        sample(logits, rows, table)
