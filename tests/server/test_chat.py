"""Chat completions over HTTP: bodies, streams, parameters, usage."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from opsin import AsyncLLM
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.server.conftest import NAME, chat, data_url, run_async, serving, user

URL = "/v1/chat/completions"


def answer(client: httpx.Client, *parts: Any, **fields: Any) -> dict[str, Any]:
    response = client.post(URL, json=chat(*parts, **fields))
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, *parts: Any, **fields: Any) -> list[Any]:
    """The events of a stream, decoded; the last must be [DONE]."""
    response = client.post(URL, json=chat(*parts, stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refused(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(URL, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_answer_has_openais_shape(client: httpx.Client):
    body = answer(client, 1, "What is this?")
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == NAME
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 8
    assert body["usage"]["prompt_tokens_details"]["multimodal_tokens"] == 16


def test_prompt_tokens_are_the_expanded_length(client: httpx.Client):
    tokens = client.post("/tokenize", json={"messages": user(1, 2, "Compare.")}).json()
    assert answer(client, 1, 2, "Compare.")["usage"]["prompt_tokens"] == tokens["count"] > 2 * 16


def test_stream_joins_to_the_whole_answer(client: httpx.Client):
    whole = answer(client, 1, "What is this?", max_tokens=24)
    chunks = events(client, 1, "What is this?", max_tokens=24)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}
    assert len(chunks) > 2  # a client that lags gets several tokens at once
    assert all("usage" not in chunk for chunk in chunks)


def test_stream_usage_comes_last_and_alone(client: httpx.Client):
    chunks = events(client, "Hello", stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert all(chunk.get("usage") is None for chunk in chunks[:-1])


def test_continuous_usage_grows_token_by_token(client: httpx.Client):
    chunks = events(client, "Hello", stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[1:]]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_several_answers_are_told_apart(client: httpx.Client):
    fields: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 11}
    whole = answer(client, 1, **fields)
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole["usage"]["completion_tokens"] == 24
    chunks = events(client, 1, **fields)
    assert [text_of(chunks, index) for index in range(3)] == texts


def test_seed_makes_answers_repeatable(client: httpx.Client):
    texts = {answer(client, seed=5, temperature=2)["choices"][0]["message"]["content"] for _ in range(2)}
    assert len(texts) == 1


def test_stop_string_ends_the_answer_and_is_named(client: httpx.Client):
    text = answer(client, 1, max_tokens=24)["choices"][0]["message"]["content"]
    stop = text[3:5]
    choice = answer(client, 1, max_tokens=24, stop=stop)["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    kept = answer(client, 1, max_tokens=24, stop=[stop], include_stop_str_in_output=True)["choices"][0]
    assert kept["message"]["content"] == text[: text.index(stop)] + stop


def test_logprobs_name_the_chosen_token_and_the_alternatives(client: httpx.Client):
    body = answer(client, "Hello", logprobs=True, top_logprobs=3, max_tokens=4)
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for token in content:
        assert [top["logprob"] for top in token["top_logprobs"]] == sorted(
            (top["logprob"] for top in token["top_logprobs"]), reverse=True
        )
        assert token["logprob"] == token["top_logprobs"][0]["logprob"]  # greedy
        assert bytes(token["bytes"]).decode() == token["token"]
    streamed = [
        token
        for chunk in events(client, "Hello", logprobs=True, top_logprobs=3, max_tokens=4)
        for choice in chunk["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


def test_logit_bias_decides(client: httpx.Client):
    token = client.post("/tokenize", json={"prompt": "x", "add_special_tokens": False}).json()["tokens"][0]
    assert answer(client, logit_bias={str(token): 100})["choices"][0]["message"]["content"] == "x" * 8


def test_max_tokens_beyond_the_context_is_cut_to_it(client: httpx.Client):
    usage = answer(client, "Hello", max_tokens=None, max_completion_tokens=100_000)["usage"]
    assert usage["total_tokens"] == 512


def test_unknown_fields_are_ignored(client: httpx.Client):
    assert answer(client, no_such_field={"a": 1}, store=True, metadata={"x": "y"})["choices"]


def test_nulls_mean_left_out(client: httpx.Client):
    nulls = dict.fromkeys(("n", "stop", "seed", "top_p", "stream", "logprobs", "tools", "response_format", "user"))
    assert answer(client, **nulls)["choices"]


def test_continue_final_message_goes_on_writing(client: httpx.Client):
    begun = [*user("Hi"), {"role": "assistant", "content": "A red"}]
    fields = {"messages": begun, "continue_final_message": True}
    prompt = client.post("/tokenize", json=fields).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": prompt}).json()["prompt"].endswith("A red")
    assert answer(client, **fields)["choices"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": data_url(1)}},
        {"type": "image_url", "image_url": {"url": data_url(1), "detail": "high"}},
        {"type": "image_url", "image_url": {"url": data_url(1)}, "uuid": "mine"},
        {"image_url": data_url(1)},
        {"type": "input_image", "image_url": data_url(1)},
        {"type": "image_url", "image_url": {"url": data_url(1).replace("image/png", "image/jpeg")}},
    ],
    ids=["plain", "detail", "uuid", "typeless", "input_image", "lying type"],
)
def test_picture_parts_of_every_form_mean_the_same(client: httpx.Client, part: Any):
    plain = answer(client, 1, "What?")
    assert answer(client, part, "What?")["choices"][0]["message"] == plain["choices"][0]["message"]


def test_uuid_of_another_picture_is_not_believed(client: httpx.Client):
    def named(seed: int) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": data_url(seed)}, "uuid": "shared"}

    first, second = (answer(client, named(seed), logprobs=True, top_logprobs=5) for seed in (1, 2))
    expected = answer(client, 2, logprobs=True, top_logprobs=5)
    assert second["choices"][0]["logprobs"] == expected["choices"][0]["logprobs"]
    assert second["choices"][0]["logprobs"] != first["choices"][0]["logprobs"]


def test_usage_details_tell_what_was_cached(client: httpx.Client):
    answer(client, 77, "Once upon a time")
    details = answer(client, 77, "Once upon a time")["usage"]["prompt_tokens_details"]
    assert details["multimodal_tokens"] == 16
    assert details["cached_tokens"] >= 16


def test_usage_details_are_left_out_on_demand(engine: AsyncLLM):
    app: FastAPI = create_app(engine, ServerConfig(enable_prompt_tokens_details=False), model=NAME)
    with serving(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        assert "prompt_tokens_details" not in answer(client, "Once")["usage"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"use_beam_search": True, "stream": True}, "stream"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"chat_template": "{{ 9**9 }}"}, "chat_template"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [1]}, "stop.0"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "messages.0.content.0"),
        ({"messages": user({"type": "image_url", "image_url": data_url(1)})}, "messages.0.content.0"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_field_is_refused_by_its_path(client: httpx.Client, fields: dict[str, Any], param: str):
    assert refused(client, chat(**fields))["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": []},
    ],
    ids=["text", "no tool", "no tools"],
)
def test_fields_that_ask_for_nothing_are_taken(client: httpx.Client, fields: dict[str, Any]):
    assert answer(client, **fields)["choices"]


def test_prompt_that_does_not_fit_is_refused_with_counts(client: httpx.Client):
    error = refused(client, chat("word " * 600))
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert "512" in error["message"]


def test_request_template_is_used_where_trusted(engine: AsyncLLM):
    app = create_app(engine, ServerConfig(trust_request_chat_template=True), model=NAME)
    with serving(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        fields = {"messages": user("Hi"), "chat_template": "{{ messages[0]['role'] }}!"}
        tokens = client.post("/tokenize", json=fields).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"].endswith("user!")
        for path in ("/etc/hostname", "/nowhere"):
            assert refused(client, chat(chat_template=path))["param"] == "chat_template"


def test_content_format_is_the_servers(engine: AsyncLLM):
    template = "{% for part in messages[0].content %}{{ part if part is string else 'PART' }}{% endfor %}"
    body = {"messages": user("ab"), "chat_template": template, "max_tokens": 1}
    counts: list[int] = []
    for form in ("string", "openai"):
        config = ServerConfig(trust_request_chat_template=True, chat_template_content_format=form)  # type: ignore[arg-type]
        app = create_app(engine, config, model=NAME)
        with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
            counts.append(client.post("/tokenize", json=body).json()["count"])
    plain = len(run_async(engine.tokenize("ab")))
    assert counts == [plain, len(run_async(engine.tokenize("PART")))]
