"""Completions that begin with their prompt."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import NAME

TEXT = "Once upon a time"


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": NAME, "prompt": TEXT, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_echo_puts_the_prompt_in_front(client: httpx.Client):
    assert complete(client, echo=True)["text"] == TEXT + complete(client)["text"]


def test_echo_of_token_ids_is_their_text(client: httpx.Client):
    ids = client.post("/tokenize", json={"prompt": TEXT, "add_special_tokens": False}).json()["tokens"]
    assert complete(client, prompt=ids, echo=True)["text"] == TEXT + complete(client, prompt=ids)["text"]


@pytest.mark.parametrize("top", [0, 2])
def test_echo_with_logprobs_tells_the_prompts_too(client: httpx.Client, top: int):
    told = complete(client, echo=True, logprobs=top)["logprobs"]
    answered = complete(client, logprobs=top)["logprobs"]
    num_prompt = len(told["tokens"]) - len(answered["tokens"])
    assert told["token_logprobs"][0] is None
    assert all(value <= 0 for value in told["token_logprobs"][1:])
    assert told["token_logprobs"][num_prompt:] == pytest.approx(answered["token_logprobs"], abs=1e-4)
    ends = [offset + len(token) for offset, token in zip(told["text_offset"], told["tokens"], strict=True)]
    assert told["text_offset"] == [0, *ends[:-1]]
    scored = client.post(
        "/v1/completions", json={"model": NAME, "prompt": TEXT, "max_tokens": 1, "prompt_logprobs": top}
    ).json()["choices"][0]["prompt_logprobs"]
    assert len(scored) == num_prompt


def test_echo_alone_scores_a_prompt_and_writes_nothing(client: httpx.Client):
    choice = complete(client, echo=True, logprobs=0, max_tokens=0)
    assert choice["text"] == TEXT
    assert len(choice["logprobs"]["tokens"]) == len(complete(client, echo=True, logprobs=0)["logprobs"]["tokens"]) - 8


def test_echo_streamed_joins_to_the_whole(client: httpx.Client):
    body = {"model": NAME, "prompt": TEXT, "temperature": 0, "max_tokens": 8, "ignore_eos": True, "echo": True}
    lines = client.post("/v1/completions", json={**body, "logprobs": 1, "stream": True}).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    whole = complete(client, echo=True, logprobs=1)
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]


@pytest.mark.parametrize("content", [TEXT, [{"type": "text", "text": TEXT}]], ids=["text", "parts"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_echo_of_a_chat_begins_with_what_the_assistant_had_said(client: httpx.Client, content: Any, stream: bool):
    messages = [{"role": "user", "content": "Tell me a story"}, {"role": "assistant", "content": content}]
    body = {"messages": messages, "continue_final_message": True, "temperature": 0, "max_tokens": 8, "stream": stream}

    def said(**fields: Any) -> str:
        response = client.post("/v1/chat/completions", json={**body, **fields})
        assert response.status_code == 200, response.text
        if not stream:
            return response.json()["choices"][0]["message"]["content"]
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")[:-2]]
        return "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines)

    assert said(echo=True) == TEXT + said()
    messages[-1]["role"] = "user"
    assert said(echo=True, continue_final_message=False) == said(continue_final_message=False)
