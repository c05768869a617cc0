"""The other routes: completions, embeddings, tokens, models."""

from __future__ import annotations

import base64
import json
import struct
import threading
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import opsin
from opsin import AsyncLLM, PoolingParams, SamplingParams
from opsin.server import generation
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.transport import json_response
from tests.engine.conftest import picture
from tests.server.conftest import NAME, chat, data_url, run_async, serving, user


def completion(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": NAME, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids_of(client: httpx.Client, text: str) -> list[int]:
    return client.post("/tokenize", json={"prompt": text}).json()["tokens"]


def test_completion_takes_every_form_of_prompt(client: httpx.Client):
    first, second = ids_of(client, "Once"), ids_of(client, "upon a time")
    texts = [choice["text"] for choice in completion(client, prompt=["Once", "upon a time"])["choices"]]
    assert completion(client, prompt="Once")["choices"][0]["text"] == texts[0]
    assert completion(client, prompt=first)["choices"][0]["text"] == texts[0]
    both = completion(client, prompt=[first, second])
    assert [choice["text"] for choice in both["choices"]] == texts
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["object"] == "text_completion"
    assert both["usage"]["prompt_tokens"] == len(first) + len(second)
    assert both["usage"]["completion_tokens"] == 16
    assert both["usage"]["total_tokens"] == len(first) + len(second) + 16


def test_completion_is_of_sixteen_tokens_unless_told(client: httpx.Client):
    assert completion(client, prompt="Once", max_tokens=None)["usage"]["completion_tokens"] == 16


def test_streamed_completions_join_to_the_whole(client: httpx.Client):
    fields: dict[str, Any] = {"prompt": ["Once", "Twice"], "n": 2, "temperature": 1, "seed": 3, "logprobs": 2}
    whole = completion(client, **fields)
    response = client.post(
        "/v1/completions",
        json={"max_tokens": 8, "ignore_eos": True, **fields, "stream": True, "stream_options": {"include_usage": True}},
    )
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [x for part in parts for x in part["logprobs"][name]] == choice["logprobs"][name]


def test_prompt_logprobs_are_told_per_prompt_token(client: httpx.Client):
    told = completion(client, prompt="Once", prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    ids = ids_of(client, "Once")
    assert told[0] is None
    assert [str(token) in position for token, position in zip(ids[1:], told[1:], strict=True)] == [True] * len(ids[1:])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 99}, "logprobs"),
        ({"prompt": "<image>"}, "prompt"),
        ({"prompt": "w " * 2000}, "prompt"),
    ],
    ids=str,
)
def test_bad_completion_is_refused(client: httpx.Client, fields: dict[str, Any], param: str | None):
    if fields == {"prompt": ""}:
        assert completion(client, prompt="")["usage"]["prompt_tokens"] == 1  # this tokenizer begins with <s>
        return
    response = client.post("/v1/completions", json={"max_tokens": 2, **fields})
    assert response.status_code == 400, response.text
    if param is not None:
        assert response.json()["error"]["param"] == param


def embed(client: httpx.Client, **fields: Any) -> list[Any]:
    response = client.post("/v1/embeddings", json={"model": NAME, **fields})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["object"] == "list"
    assert body["id"].startswith("embd-")
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0
    return [item["embedding"] for item in body["data"]]


def test_embeddings_are_the_engines_own(client: httpx.Client, engine: AsyncLLM):
    expected = run_async(engine.embed("Hello")).outputs.embedding
    texts = embed(client, input=["Hello", "there"])
    assert texts[0] == pytest.approx(expected, abs=1e-5)
    assert sum(value**2 for value in texts[1]) == pytest.approx(1, abs=1e-4)
    for form in ("Hello", [ids_of(client, "Hello")], ids_of(client, "Hello")):
        assert embed(client, input=form)[0] == pytest.approx(expected, abs=1e-5)


def test_embedding_of_a_conversation_sees_its_picture(client: httpx.Client, engine: AsyncLLM):
    prompt: Any = {
        "prompt": "USER: <image>\nDescribe. ",
        "multi_modal_data": {"image": picture(1)},
    }
    expected = run_async(engine.embed(prompt)).outputs.embedding
    part = {"type": "image_url", "image_url": {"url": data_url(1)}}
    (vector,) = embed(client, messages=user(part, "Describe."))
    assert vector == pytest.approx(expected, abs=1e-4)
    (other,) = embed(client, messages=user(2, "Describe."))
    assert vector != pytest.approx(other, abs=1e-2)


def test_base64_embedding_is_the_same_numbers(client: httpx.Client):
    (numbers,) = embed(client, input="Hello")
    (text,) = embed(client, input="Hello", encoding_format="base64")
    raw = base64.b64decode(text)
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(numbers, abs=1e-6)


def test_dimensions_cut_and_normalise_again(client: httpx.Client, engine: AsyncLLM):
    (short,) = embed(client, input="Hello", dimensions=8)
    expected = run_async(engine.embed("Hello", PoolingParams(dimensions=8))).outputs.embedding
    assert short == pytest.approx(expected, abs=1e-5)
    assert len(short) == 8


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": "a", "messages": user("a")}, "input"),
        ({"input": []}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 10**6}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": ["fine", "w " * 2000]}, "input"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_embedding_is_refused(client: httpx.Client, fields: dict[str, Any], param: str):
    response = client.post("/v1/embeddings", json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_tokens_and_text_are_each_others_inverse(client: httpx.Client):
    plain = {"prompt": "How many cats?", "add_special_tokens": False}
    told = client.post("/tokenize", json=plain).json()
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == 512
    assert client.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "How many cats?"}
    assert len(ids_of(client, "How many cats?")) == told["count"] + 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": user("a")}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**40]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
def test_bad_tokens_are_refused(client: httpx.Client, path: str, body: dict[str, Any]):
    assert client.post(path, json=body).status_code == 400


def test_models_and_version(client: httpx.Client):
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [NAME, "alias"]
    assert {card["root"] for card in cards} == {"root"}
    assert cards[0]["max_model_len"] == 512
    assert client.get("/version").json() == {"version": opsin.__version__}


def test_probes_are_empty(client: httpx.Client):
    for path in ("/health", "/live", "/ready"):
        response = client.get(path)
        assert (response.status_code, response.content) == (200, b"")
    assert client.post("/v1/chat/completions", json=chat()).status_code == 200


class WithLongest:
    """The engine of a checkpoint whose generation_config.json has max_new_tokens; otherwise the real one."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def get_default_sampling_params(self, max_tokens: int | None = 16) -> SamplingParams:
        return SamplingParams(max_tokens=5)


def test_longest_answer_of_a_chat_comes_from_the_checkpoint(engine: AsyncLLM):
    app = create_app(WithLongest(engine), ServerConfig(), model=NAME)  # type: ignore[arg-type]
    body = {"messages": user("a"), "ignore_eos": True}
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        for fields, expected in (({}, 5), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 3}, 3)):
            usage = client.post("/v1/chat/completions", json={**body, **fields}).json()["usage"]
            assert usage["completion_tokens"] == expected


@pytest.mark.parametrize("name", ["top_k", "max_tokens", "truncate_prompt_tokens", "priority"])
def test_number_of_more_than_64_bits_is_refused(client: httpx.Client, name: str):
    response = client.post("/v1/chat/completions", json={"messages": user("a"), name: 2**70})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


def test_model_is_found_by_each_of_its_names(client: httpx.Client):
    listed = client.get("/v1/models").json()["data"]
    assert [client.get(f"/v1/models/{card['id']}").json() for card in listed] == listed
    response = client.get("/v1/models/some/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


BAD = "ftp://example.org/x"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/pick", {"choices": ["a", "b"], "question": "q", "image": BAD}, "image"),
        ("/page/seen", {"image_url": BAD}, "image_url"),
        ("/rerank", {"query": "a", "documents": ["b", {"content": 5}]}, "documents.1.content"),
        ("/rerank", {"query": {"content": 5}, "documents": ["b"]}, "query.content"),
        ("/score", {"text_1": "a", "text_2": ["b", {"content": None}]}, "text_2.1.content"),
    ],
)
def test_error_about_what_became_a_message_names_the_bodys_field(
    client: httpx.Client, path: str, body: dict[str, Any], param: str
):
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_many_prompt_logprobs_are_written_beside_the_event_loop(client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    writers: list[int] = []

    def noting(body: Any) -> Any:
        writers.append(threading.get_ident())
        return json_response(body)

    monkeypatch.setattr(generation, "json_response", noting)
    completion(client, prompt="Once upon a time", max_tokens=1)
    completion(client, prompt="Once upon a time", max_tokens=1, prompt_logprobs=1)
    assert len(set(writers)) == 2


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/"])
def test_head_is_answered_as_get_without_a_body(client: httpx.Client, path: str):
    get, head = client.get(path), client.head(path)
    assert head.status_code == get.status_code == 200
    assert head.headers.get("content-type") == get.headers.get("content-type")
    assert head.content == b""
    assert client.get(path).status_code == 200  # on the same connection


def test_load_counts_what_is_answered_and_ping_is_health(client: httpx.Client, app: FastAPI):
    assert client.get("/load").json() == {"server_load": 0}
    with app.state.server.admission.enter(3):
        assert client.get("/load").json() == {"server_load": 3}
    assert [client.request(method, "/ping").status_code for method in ("GET", "POST")] == [200, 200]


def test_tokens_take_a_place_like_answers(client: httpx.Client, app: FastAPI):
    admission = app.state.server.admission
    with admission.enter(admission._capacity):
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            response = client.post(path, json=body)
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
    assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200


def test_slash_at_the_end_of_a_path_leads_nowhere_else(client: httpx.Client):
    asked = {"Host": "evil.example"}
    assert client.post("/v1/chat/completions/", json=chat(), headers=asked).status_code == 200
    missing = client.get("/health/", headers=asked)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "route_not_found")
    assert "location" not in missing.headers
