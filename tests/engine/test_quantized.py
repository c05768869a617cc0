"""An engine over weights or a KV cache of 8 bits keeps what every engine keeps."""

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


@pytest.mark.parametrize(
    "stored", [{"quantization": "fp8"}, {"quantization": "int8"}, {"kv_cache_dtype": "fp8"}], ids=str
)
def test_answers_are_alike_batched_alone_and_in_chunks(make_llm: Callable[..., LLM], stored: dict[str, Any]):
    expected: list[list[int]] | None = None
    for settings in ({}, {"max_num_batched_tokens": 7}, {"pipeline_depth": 2}):
        llm = make_llm(dtype="float32", **stored, **settings)
        together = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        alone = [llm.generate(p, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for p in PROMPTS]
        assert_idle(llm)
        expected = expected or together
        assert together == alone == expected


def test_fp8_weighs_less_in_the_memory_plan(make_llm: Callable[..., LLM]):
    plain, quantized = (make_llm(quantization=q, dtype="float32").memory_plan.weight_bytes for q in (None, "fp8"))
    assert quantized < 0.65 * plain


def test_fp8_cache_takes_a_quarter_of_float32_s(make_llm: Callable[..., LLM]):
    plain, narrow = (
        make_llm(dtype="float32", num_gpu_blocks_override=64, **setting).memory_plan
        for setting in ({}, {"kv_cache_dtype": "fp8_e4m3"})
    )
    assert narrow.kv_bytes * 4 == plain.kv_bytes


def test_fp8_cache_changes_what_is_read_from_it(make_llm: Callable[..., LLM]):
    """Log-probabilities move, by little: the cache is used, and means the same."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    (plain,), (narrow,) = (
        make_llm(dtype="float32", **setting).generate(PROMPTS[:1], params, use_tqdm=False)
        for setting in ({}, {"kv_cache_dtype": "fp8"})
    )
    sums = [output.outputs[0].cumulative_logprob for output in (plain, narrow)]
    assert sums[0] != sums[1]
    assert sums[0] == pytest.approx(sums[1], abs=0.3)


def test_other_quantizations_are_refused_by_name():
    with pytest.raises(ConfigError, match="quantization is 'awq'; it must be one of fp8"):
        EngineConfig.from_flat({"quantization": "awq"})
