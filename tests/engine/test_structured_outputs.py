"""Answers under a grammar: their form, their neighbours', and what happens when no token fits."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from opsin import LLM, SamplingParams
from opsin.errors import RequestError
from opsin.params import StructuredOutputsParams, Thinking
from tests.engine.conftest import asked, assert_idle, everybody_let_in

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


# ------------------------------------------------------------------------------------ forms behind what was thought


def closing(tokens: list[int]) -> int:
    """The first token that differs from all before it, but for the first few: one that can end a thought."""
    return next(token for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("is_open", [True, False], ids=["begun", "not begun"])
def test_generate_form_begins_behind_the_thoughts_which_are_free(
    make_llm: Callable[..., LLM], depth: int, is_open: bool
):
    llm = make_llm(pipeline_depth=depth)
    (free,) = llm.generate(asked(1), FREE, use_tqdm=False)
    tokens = free.outputs[0].token_ids
    end = closing(tokens)
    # What the model says first anyway, where it is to begin its thoughts itself.
    thinking = Thinking(opens=llm.model_spec.vocab_size - 1 if is_open else tokens[0], closes=end, is_open=is_open)
    params = under(json=SCHEMA, disable_any_whitespace=True, thinking=thinking)
    (output,) = llm.generate(asked(1), params, use_tqdm=False)
    answer = output.outputs[0]
    thought = tokens[: tokens.index(end) + 1]
    assert answer.token_ids[: len(thought)] == thought
    said = llm.get_tokenizer().decode(answer.token_ids[len(thought) :], skip_special_tokens=True)
    assert json.loads(said)["colour"] in ("red", "blue")
    assert answer.finish_reason == "stop"
    assert_idle(llm)


def test_generate_form_holds_at_once_where_nothing_is_thought(llm: LLM):
    eos = llm.get_tokenizer().eos_token_id
    params = under(choice=["yes", "no"], thinking=Thinking(opens=eos + 1, closes=eos))
    params.logit_bias = {eos + 1: -100}
    (output,) = llm.generate(asked(1), params, use_tqdm=False)
    assert output.outputs[0].text in ("yes", "no")


def test_generate_thoughts_without_end_are_cut_like_any_answer(llm: LLM):
    (free,) = llm.generate(asked(1), FREE, use_tqdm=False)
    never = next(token for token in range(300, 400) if token not in free.outputs[0].token_ids)
    params = under(12, choice=["yes", "no"], thinking=Thinking(opens=0, closes=never, is_open=True))
    params.ignore_eos = True
    (output,) = llm.generate(asked(1), params, use_tqdm=False)
    assert output.outputs[0].token_ids == free.outputs[0].token_ids
    assert output.outputs[0].finish_reason == "length"


def test_generate_preempted_in_its_thoughts_goes_on_thinking(make_llm: Callable[..., LLM]):
    llm = make_llm(num_gpu_blocks_override=17, block_size=4, enable_prefix_caching=False)
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = ["Hello there", "One two three"]
    alone = [llm.generate(prompt, long, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    thoughts: list[list[int]] = []
    params: list[SamplingParams] = []
    for tokens in alone:
        end = max(set(tokens), key=tokens.index)  # the one that comes last for the first time
        thoughts.append(tokens[: tokens.index(end) + 1])
        params.append(under(44, choice=["yes"], thinking=Thinking(opens=0, closes=end, is_open=True)))
    with everybody_let_in():
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert llm.stats()["num_preemptions_total"] > 0
    for output, thought in zip(outputs, thoughts, strict=True):
        assert output.outputs[0].token_ids[: len(thought)] == thought
        assert output.outputs[0].text.endswith("yes")
    assert_idle(llm)


def test_generate_thinking_that_the_model_has_no_token_for_is_refused(llm: LLM):
    outside = Thinking(opens=llm.model_spec.vocab_size, closes=1)
    with pytest.raises(RequestError, match="opens with the token"):
        llm.generate("Hello", under(choice=["yes"], thinking=outside), use_tqdm=False)
    with pytest.raises(RequestError, match="must be a token id"):
        Thinking(opens=-1, closes=1)
    with pytest.raises(RequestError, match="thinking"):
        under(choice=["yes"], thinking={"opens": 1, "closes": 2})
    assert_idle(llm)
