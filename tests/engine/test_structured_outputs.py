"""Answers under a grammar: their form, their neighbours', and what happens when no token fits."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from opsin import LLM, SamplingParams
from opsin.errors import RequestError
from opsin.params import StructuredOutputsParams
from tests.engine.conftest import asked, assert_idle

FREE = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def under(max_tokens: int = 60, *, temperature: float = 0.0, n: int = 1, **constraint: object) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        n=n,
        seed=3,
        structured_outputs=StructuredOutputsParams(**constraint),  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_generate_constrained_answers_keep_their_form_and_leave_others_alone(make_llm: Callable[..., LLM], depth: int):
    llm = make_llm(pipeline_depth=depth)
    prompts = [asked(1), asked(2), asked(1), asked(3)]
    alone = [llm.generate(prompt, FREE, use_tqdm=False)[0].outputs[0].token_ids for prompt in (prompts[0], prompts[3])]
    params = [FREE, under(json=SCHEMA, disable_any_whitespace=True), under(choice=["yes", "no"]), FREE]
    first, as_json, chosen, last = llm.generate(prompts, params, use_tqdm=False)
    assert [first.outputs[0].token_ids, last.outputs[0].token_ids] == alone
    answer = json.loads(as_json.outputs[0].text)
    assert answer["colour"] in ("red", "blue")
    assert 0 <= answer["count"] <= 99
    assert chosen.outputs[0].text in ("yes", "no")
    assert [out.outputs[0].finish_reason for out in (as_json, chosen)] == ["stop", "stop"]
    assert_idle(llm)


def test_generate_constrained_answer_is_the_same_one_and_two_steps_deep(make_llm: Callable[..., LLM]):
    params = under(json=SCHEMA, temperature=1.0)
    texts = {
        make_llm(pipeline_depth=depth).generate(asked(5), params, use_tqdm=False)[0].outputs[0].text for depth in (1, 2)
    }
    assert len(texts) == 1


def test_generate_samples_of_one_prompt_follow_the_grammar_each_for_itself(llm: LLM):
    (output,) = llm.generate(asked(5), under(regex="[a-z]{4}", temperature=2.0, n=4), use_tqdm=False)
    texts = [answer.text for answer in output.outputs]
    assert all(len(text) == 4 and text.isalpha() and text.islower() for text in texts)
    assert len(set(texts)) > 1


def test_generate_preempted_answer_keeps_its_form(make_llm: Callable[..., LLM]):
    llm = make_llm(num_gpu_blocks_override=9, block_size=16, enable_prefix_caching=False)
    params = [under(regex="[a-z]{40}", max_tokens=60), FREE, under(regex="[0-9]{40}", max_tokens=60)]
    outputs = llm.generate(["Hello there", "Hello", "One two three"], params, use_tqdm=False)
    assert len(outputs[0].outputs[0].text) == len(outputs[2].outputs[0].text) == 40
    assert outputs[2].outputs[0].text.isdigit()
    assert_idle(llm)


def test_generate_no_token_fits_fails_that_request_alone(llm: LLM):
    impossible = under(choice=["yes"])
    impossible.allowed_token_ids = [llm.get_tokenizer().encode("7", add_special_tokens=False)[-1]]
    failed, fine = llm.generate(
        ["Hello", "Hello"], [impossible, under(choice=["yes"])], use_tqdm=False, return_exceptions=True
    )
    assert isinstance(failed, RequestError)
    assert "structured_outputs" in str(failed)
    assert not isinstance(fine, Exception)
    assert fine.outputs[0].text == "yes"


def test_generate_malformed_grammar_is_refused_before_it_runs(llm: LLM):
    with pytest.raises(RequestError, match="not usable"):
        llm.generate("Hello", under(regex="((("), use_tqdm=False)
    assert_idle(llm)
