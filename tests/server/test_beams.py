"""Beam search over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

from opsin import LLM, AsyncLLM, BeamSearchParams
from tests.server.conftest import NAME, assert_idle, chat

if TYPE_CHECKING:
    from tests.factory import LlavaShape

COMPLETION = "/v1/completions"


@pytest.fixture(scope="module")
def offline(tiny_llava: Callable[[LlavaShape], Path]) -> Iterator[LLM]:
    from tests.factory import LlavaShape

    with LLM(str(tiny_llava(LlavaShape(num_kv_heads=2)))) as llm:
        yield llm


def completion(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": prompt, "use_beam_search": True, "max_tokens": 6, **fields}


@pytest.mark.parametrize(("length_penalty", "ignores_end"), [(1.0, False), (0.0, False), (2.0, True)])
def test_answers_are_those_of_the_offline_search(
    client: httpx.Client, offline: LLM, length_penalty: float, ignores_end: bool
) -> None:
    prompts = ["What is this?", "A red"]
    fields = {"length_penalty": length_penalty, "ignore_eos": ignores_end}
    answer = client.post(COMPLETION, json=completion(prompts, n=3, return_token_ids=True, **fields)).json()
    found = offline.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=6, **fields))
    expected = [(sequence.text, sequence.finish_reason) for output in found for sequence in output.sequences]
    assert [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    tokens = [sequence.tokens for output in found for sequence in output.sequences]
    assert [choice["prompt_token_ids"] + choice["token_ids"] for choice in answer["choices"]] == tokens
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])


def test_search_of_one_beam_is_the_greedy_answer_about_a_picture(client: httpx.Client) -> None:
    body = chat("What is", 5, "here?", return_token_ids=True)
    greedy = client.post("/v1/chat/completions", json=body).json()
    searched = client.post("/v1/chat/completions", json={**body, "use_beam_search": True}).json()
    assert searched["choices"][0]["token_ids"] == greedy["choices"][0]["token_ids"]
    assert searched["choices"][0]["message"] == greedy["choices"][0]["message"]
    assert searched["usage"]["prompt_tokens"] == greedy["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": "a"}, "stop"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"n": 11}, "n"),
        ({"length_penalty": "long"}, "length_penalty"),
    ],
)
def test_what_a_search_cannot_do_is_refused(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = client.post(COMPLETION, json=completion("Hi", **fields))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_fields_that_ask_for_nothing_go_with_a_search(client: httpx.Client) -> None:
    nothing = {"stream": False, "stop": [], "logit_bias": {}, "presence_penalty": 0, "repetition_penalty": 1.0}
    asked = chat(use_beam_search=True, logprobs=False, response_format={"type": "text"}, tools=[], **nothing)
    assert client.post("/v1/chat/completions", json=asked).status_code == 200


def test_chat_without_a_length_cannot_be_searched(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=chat(use_beam_search=True, max_tokens=None))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")


def test_client_that_leaves_ends_its_search(client: httpx.Client, app: FastAPI, engine: AsyncLLM) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post(COMPLETION, json=completion("Go", n=8, max_tokens=400, ignore_eos=True), timeout=0.3)
    assert_idle(app, engine)
