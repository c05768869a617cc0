"""An engine over FP8 linear layers keeps what every engine keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from opsin import LLM, SamplingParams
from opsin.config import EngineConfig
from opsin.errors import ConfigError
from tests.engine.conftest import asked, assert_idle

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS: list[Any] = [asked(1), asked(2, 3), "Only text here."]


def test_fp8_answers_alike_batched_alone_and_in_chunks(make_llm: Callable[..., LLM]):
    expected: list[list[int]] | None = None
    for settings in ({}, {"max_num_batched_tokens": 7}, {"pipeline_depth": 2}):
        llm = make_llm(quantization="fp8", dtype="float32", **settings)
        together = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        alone = [llm.generate(p, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for p in PROMPTS]
        assert_idle(llm)
        expected = expected or together
        assert together == alone == expected


def test_fp8_weighs_less_in_the_memory_plan(make_llm: Callable[..., LLM]):
    plain, quantized = (make_llm(quantization=q, dtype="float32").memory_plan.weight_bytes for q in (None, "fp8"))
    assert quantized < 0.65 * plain


def test_other_quantizations_are_refused_by_name():
    with pytest.raises(ConfigError, match="quantization is 'awq'; it must be one of fp8"):
        EngineConfig.from_flat({"quantization": "awq"})
