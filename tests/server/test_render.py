"""What bodies become before they are answered."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.server.conftest import NAME, chat, data_url

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def test_rendered_chat_is_what_would_be_answered(client: httpx.Client) -> None:
    body = chat(1, "What are", 2, "these?", request_id="mine", cache_salt="s", stop=["x"], return_token_ids=True)
    answer = client.post(CHAT, json=body).json()
    rendered = client.post(f"{CHAT}/render", json=body).json()
    assert rendered["token_ids"] == answer["prompt_token_ids"]
    assert rendered["request_id"] == "chatcmpl-mine"
    assert (rendered["model"], rendered["cache_salt"], rendered["priority"]) == (NAME, "s", 0)
    params = rendered["sampling_params"]
    assert (params["max_tokens"], params["temperature"], params["stop"]) == (8, 0, ["x"])
    assert (rendered["stream"], rendered["stream_options"], rendered["kv_transfer_params"]) == (False, None, None)


def test_rendered_pictures_have_names_and_places(client: httpx.Client) -> None:
    rendered = client.post(f"{CHAT}/render", json=chat(1, "and", 2, "and", 1)).json()
    features = rendered["features"]
    first, second, third = features["mm_hashes"]["image"]
    assert first == third != second
    ids = rendered["token_ids"]
    places = features["mm_placeholders"]["image"]
    for place in places:
        assert len(set(ids[place["offset"] : place["offset"] + place["length"]])) == 1
    assert sum(place["length"] for place in places) == ids.count(ids[places[0]["offset"]])
    assert [place["offset"] for place in places] == sorted(place["offset"] for place in places)


def test_rendered_completions_are_a_list(client: httpx.Client) -> None:
    prompts = ["One", "Two two"]
    body: dict[str, Any] = {"prompt": prompts, "stream": True, "stream_options": {"include_usage": True}, "priority": 3}
    rendered = client.post(f"{COMPLETION}/render", json=body).json()
    tokens = [client.post("/tokenize", json={"prompt": prompt}).json()["tokens"] for prompt in prompts]
    assert [entry["token_ids"] for entry in rendered] == tokens
    for entry in rendered:
        assert (entry["features"], entry["model"], entry["stream"], entry["priority"]) == (None, NAME, True, 3)
        assert entry["stream_options"]["include_usage"] is True
        assert entry["sampling_params"]["max_tokens"] == 16


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), "messages"),
        (CHAT, chat("a " * 5000), "messages"),
        (COMPLETION, {"prompt": []}, "prompt"),
        (COMPLETION, {"prompt": "x", "temperature": -1}, "temperature"),
    ],
)
def test_body_that_cannot_be_answered_cannot_be_rendered(
    client: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answered, rendered = (client.post(path + end, json=body) for end in ("", "/render"))
    assert (rendered.status_code, rendered.json()["error"]) == (400, answered.json()["error"])
    assert rendered.json()["error"]["param"].startswith(param)


def test_search_cannot_be_rendered(client: httpx.Client) -> None:
    answer = client.post(f"{CHAT}/render", json=chat(use_beam_search=True))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "use_beam_search")


def test_rendering_runs_nothing(client: httpx.Client, app: FastAPI) -> None:
    def counted() -> dict[str, float]:
        return {name: value for name, value in app.state.server.engine.stats().items() if name.endswith("_total")}

    before = counted()
    assert before
    body = chat({"type": "image_url", "image_url": {"url": data_url(77)}})
    assert client.post(f"{CHAT}/render", json=body).status_code == 200
    assert counted() == before


def test_rendered_requests_are_described(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path, kind in ((CHAT, None), (COMPLETION, "array")):
        schema = paths[f"{path}/render"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert schema.get("type") == kind
        assert (schema if kind is None else schema["items"])["$ref"].endswith("/RenderedRequest")
