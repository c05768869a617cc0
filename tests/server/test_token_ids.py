"""Ids of tokens in answers, special tokens before prompts, and what operators add to answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from opsin import AsyncLLM
from tests.server.conftest import NAME, chat
from tests.server.test_options import served


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = client.post(path, json={**body, "stream": True}).text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def completion(prompt: Any = "What is this?", **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields}


def test_chat_tells_the_ids_of_prompt_and_answers(client: httpx.Client) -> None:
    body = chat("What?", 3, return_token_ids=True, n=2, temperature=1, seed=3)
    answer = client.post("/v1/chat/completions", json=body).json()
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert [len(choice["token_ids"]) for choice in answer["choices"]] == [8, 8]
    chunks = stream(client, "/v1/chat/completions", body)
    assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [
        answer["prompt_token_ids"]
    ]
    streamed: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice.get("token_ids", [])
    assert streamed == {choice["index"]: choice["token_ids"] for choice in answer["choices"]}


def test_completions_tell_the_ids_of_each_prompt_once(client: httpx.Client) -> None:
    body = completion(["One", "Two two"], return_token_ids=True)
    answer = client.post("/v1/completions", json=body).json()
    prompts = [client.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in body["prompt"]]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == prompts
    streamed: dict[int, list[int]] = {0: [], 1: []}
    told: dict[int, list[list[int]]] = {0: [], 1: []}
    for chunk in stream(client, "/v1/completions", body):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["token_ids"]
            told[choice["index"]] += [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
    assert told == {0: prompts[:1], 1: prompts[1:]}
    assert streamed == {choice["index"]: choice["token_ids"] for choice in answer["choices"]}


def test_prompt_that_is_only_echoed_has_no_ids_of_an_answer(client: httpx.Client) -> None:
    body = completion(echo=True, max_tokens=0, return_token_ids=True)
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["token_ids"]) == (body["prompt"], [])


def test_ids_are_told_only_where_they_are_asked_for(client: httpx.Client) -> None:
    for path, body in (("/v1/chat/completions", chat()), ("/v1/completions", completion())):
        text = client.post(path, json=body).text + client.post(path, json={**body, "stream": True}).text
        assert "token_ids" not in text


def test_logprobs_name_tokens_by_id_and_keep_their_bytes(client: httpx.Client) -> None:
    body = chat(logprobs=True, top_logprobs=2, return_token_ids=True)
    texts = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    body["return_tokens_as_token_ids"] = True
    named = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert [entry["token"] for entry in named["logprobs"]["content"]] == [f"token_id:{i}" for i in texts["token_ids"]]
    for entry, plain in zip(named["logprobs"]["content"], texts["logprobs"]["content"], strict=True):
        assert (entry["bytes"], entry["logprob"]) == (plain["bytes"], plain["logprob"])
        assert all(top["token"].startswith("token_id:") for top in entry["top_logprobs"])


@pytest.mark.parametrize("streams", [False, True])
def test_completions_name_tokens_by_id_with_the_texts_offsets(client: httpx.Client, streams: bool) -> None:
    def told(**fields: Any) -> dict[str, list[Any]]:
        body = completion(logprobs=1, echo=True, **fields)
        whole: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "top_logprobs": []}
        answers = (
            stream(client, "/v1/completions", body) if streams else [client.post("/v1/completions", json=body).json()]
        )
        for answer in answers:
            for name in whole:
                whole[name] += answer["choices"][0]["logprobs"][name]
        return whole

    plain, named = told(), told(return_tokens_as_token_ids=True)
    assert named["text_offset"] == plain["text_offset"]
    assert named["tokens"] != plain["tokens"]
    keys = [*named["tokens"], *(key for top in named["top_logprobs"] if top for key in top)]
    assert all(key.startswith("token_id:") and key[9:].isdigit() for key in keys)


def test_special_tokens_come_before_prompts_unless_they_are_left_out(client: httpx.Client) -> None:
    def ids(path: str, **fields: Any) -> list[int]:
        body = {**(chat() if "chat" in path else completion()), "return_token_ids": True, **fields}
        answer = client.post(path, json=body).json()
        return answer["prompt_token_ids"] if "chat" in path else answer["choices"][0]["prompt_token_ids"]

    for path in ("/v1/chat/completions", "/v1/completions"):
        usual, bare, with_them = ids(path), ids(path, add_special_tokens=False), ids(path, add_special_tokens=True)
        assert with_them == [with_them[0], *bare]
        assert usual in (bare, with_them)
    tokens = [
        client.post("/tokenize", json={"messages": chat()["messages"], "add_special_tokens": special}).json()["tokens"]
        for special in (False, True)
    ]
    assert tokens == [ids("/v1/chat/completions", add_special_tokens=special) for special in (False, True)]


def test_operator_may_name_tokens_by_id_and_count_them_in_every_stream(engine: AsyncLLM) -> None:
    settings = {"return_tokens_as_token_ids": True, "enable_force_include_usage": True}
    with served(engine, **settings) as client:
        for path, body in (("/v1/chat/completions", chat()), ("/v1/completions", completion())):
            *_, last = stream(client, path, body)
            assert last["usage"]["completion_tokens"] == 8
        body = completion(logprobs=0)
        assert "token_id:" in client.post("/v1/completions", json=body).text
        body["return_tokens_as_token_ids"] = False
        assert "token_id:" not in client.post("/v1/completions", json=body).text


def test_operator_may_give_the_template_values_and_requests_replace_them(engine: AsyncLLM) -> None:
    template = "{{ mood }}{{ hour }} {{ messages[0]['content'] }}"
    settings = {"default_chat_template_kwargs": {"mood": "gay", "hour": 3}, "trust_request_chat_template": True}
    with served(engine, **settings) as client:
        body = {"messages": [{"role": "user", "content": "Hi"}], "chat_template": template}

        def text(**fields: Any) -> str:
            tokens = client.post("/tokenize", json={**body, **fields, "add_special_tokens": False}).json()["tokens"]
            return client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]

        assert text() == "gay3 Hi"
        assert text(chat_template_kwargs={"hour": 4}) == "gay4 Hi"


def test_tools_may_be_hidden_where_none_may_be_called(engine: AsyncLLM) -> None:
    template = "{{ (tools or []) | length }} {{ messages[0]['content'] }}"
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    body = chat(tools=[tool], tool_choice="none", chat_template=template, return_token_ids=True)
    counts: list[str] = []
    for hides in (False, True):
        settings = {"exclude_tools_when_tool_choice_none": hides, "trust_request_chat_template": True}
        with served(engine, **settings) as client:
            ids = client.post("/v1/chat/completions", json=body).json()["prompt_token_ids"]
            counts.append(client.post("/detokenize", json={"tokens": ids}).json()["prompt"])
    assert ["1 What" in counts[0], "0 What" in counts[1]] == [True, True]


def test_prompt_is_cut_to_what_the_context_holds_beside_the_answer(client: httpx.Client, engine: AsyncLLM) -> None:
    long = "word " * engine.max_model_len
    (choice,) = client.post(
        "/v1/completions", json=completion(long, truncate_prompt_tokens=-1, return_token_ids=True)
    ).json()["choices"]
    assert len(choice["prompt_token_ids"]) == engine.max_model_len - 8
    assert len(choice["token_ids"]) == 8
    body = chat(long, truncate_prompt_tokens=-1, max_tokens=None, return_token_ids=True)
    answer = client.post("/v1/chat/completions", json=body).json()
    assert len(answer["prompt_token_ids"]) == engine.max_model_len - 1
    refused = client.post("/v1/completions", json=completion(long, truncate_prompt_tokens=-2)).json()["error"]
    assert refused["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_prompt_is_not_cut_to_nothing_for_an_answer_that_fills_the_context(
    client: httpx.Client, engine: AsyncLLM, field: str
) -> None:
    asked = chat("word " * 9, truncate_prompt_tokens=-1, **{"max_tokens": None, field: engine.max_model_len})
    answer = client.post("/v1/chat/completions", json=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
