"""What requests are spared: sends, changes of threads, the router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message, Scope

from opsin import AsyncLLM
from opsin.errors import MediaError
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.server.conftest import assert_idle, chat, data_url, run_async


async def sent(
    app: FastAPI,
    body: dict[str, Any],
    path: str = "/v1/chat/completions",
    is_ready: Callable[[], bool] = lambda: True,
) -> list[Message]:
    """The messages by which an application answers a POST.

    Args:
        is_ready: whether the client reads on.
    """
    messages: list[Message] = []
    asked = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Message:
        if not asked:
            await asyncio.Event().wait()
        return asked.pop()

    async def send(message: Message) -> None:
        messages.append(message)
        while message.get("body") and not is_ready():
            await asyncio.sleep(0.01)

    scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    await asyncio.wait_for(app(scope, receive, send), 60)
    return messages


def test_stream_is_sent_in_no_more_pieces_than_tokens(app: FastAPI, engine: AsyncLLM):
    head, *pieces, end = run_async(sent(app, chat(stream=True, stream_options={"include_usage": True})))
    assert head["status"] == 200
    assert len(pieces) <= 8
    assert b'"role":"assistant"' in pieces[0]["body"]
    assert pieces[0]["body"].count(b"data: ") == 2
    assert pieces[-1]["body"].count(b"data: ") == 3  # the last token, usage, and the word at the end
    assert pieces[-1]["body"].endswith(b"data: [DONE]\n\n")
    assert not end["body"]
    assert_idle(app, engine)


def test_stream_of_several_prompts_tells_of_those_that_end_first(app: FastAPI, engine: AsyncLLM):
    body = {"prompt": ["Once", "Twice"], "max_tokens": 4, "ignore_eos": True, "temperature": 0, "stream": True}
    _, *pieces, _ = run_async(sent(app, body, "/v1/completions"))
    events = b"".join(piece["body"] for piece in pieces).decode().split("\n\n")
    ends = [json.loads(event[6:])["choices"][0] for event in events if '"finish_reason":"length"' in event]
    assert sorted(choice["index"] for choice in ends) == [0, 1]
    assert events[-2:] == ["data: [DONE]", ""]
    assert_idle(app, engine)


def told(pieces: list[Message]) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """All that the events of a stream tell of each answer, and the token counts in their order."""
    lines = b"".join(piece["body"] for piece in pieces).split(b"\n\n")
    events = [json.loads(line[6:]) for line in lines if line not in (b"", b"data: [DONE]")]
    answers: dict[int, dict[str, Any]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        answer = answers.setdefault(choice["index"], {"text": "", "ids": [], "logprobs": {}, "ends": []})
        answer["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        answer["ids"] += choice.get("token_ids", [])
        for name, values in (choice["logprobs"] or {}).items():
            answer["logprobs"].setdefault(name, []).extend(values)
        answer["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return answers, [event["usage"] for event in events if event.get("usage")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat(logprobs=True, top_logprobs=2)),
        ("/v1/completions", {"prompt": "Once", "temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 2}),
    ],
    ids=["chat", "completion"],
)
def test_client_that_lags_is_told_the_same_in_fewer_pieces(
    app: FastAPI, engine: AsyncLLM, path: str, body: dict[str, Any]
):
    counts = {"include_usage": True, "continuous_usage_stats": True}
    body = {**body, "n": 2, "stream": True, "stream_options": counts, "return_token_ids": True}

    def has_ended() -> bool:
        return engine.stats()["num_requests_running"] == 0

    _, *kept_up, _ = run_async(sent(app, body, path))
    _, *lagged, _ = run_async(sent(app, body, path, has_ended))
    assert len(lagged) <= 3  # the first token, what came since, and, if it was not yet handed over, the last
    answers, usages = told(lagged)
    all_answers, all_usages = told(kept_up)
    assert answers == all_answers
    assert [len(answer["ids"]) for answer in answers.values()] == [8, 8]
    assert usages[-1] == all_usages[-1]
    assert usages[-1]["completion_tokens"] == 16
    assert_idle(app, engine)


def test_pictures_that_come_along_wait_for_no_fetch(
    app: FastAPI, engine: AsyncLLM, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    async def refuse(url: str, modality: str) -> bytes:
        raise MediaError("fetched", code="failed_to_download_image")

    monkeypatch.setattr(engine._reading._fetcher, "fetch", refuse)
    assert client.post("/v1/chat/completions", json=chat("What is this?", 1, 2)).status_code == 200
    far: dict[str, Any] = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    mixed = client.post("/v1/chat/completions", json=chat("What is this?", 1, far))
    assert mixed.status_code == 400
    assert mixed.json()["error"]["message"].startswith("fetched")


def test_broken_picture_among_those_that_come_along_is_named(client: httpx.Client):
    broken = {"type": "image_url", "image_url": {"url": data_url(1)[:-40] + "@@@@"}}
    answer = client.post("/v1/chat/completions", json=chat("What is this?", 1, broken))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_base64_image"
    assert answer.json()["error"]["param"] == "messages.0.content.2.image_url"


def test_application_under_a_prefix_takes_posts_as_well(engine: AsyncLLM):
    outer = FastAPI()
    outer.mount("/vision", create_app(engine, ServerConfig(), model="root"))
    head, *_ = run_async(sent(outer, chat(model="root"), "/vision/v1/chat/completions"))
    assert head["status"] == 200
