"""Pictures that are named once and not sent again."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from opsin import AsyncLLM
from opsin.errors import RequestError
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.remembered import RememberedMedia
from tests.server.conftest import NAME, data_url, serving

URL = "/v1/chat/completions"


def part(url: str | None, uuid: str | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "image_url", "image_url": None if url is None else {"url": url}}
    return made if uuid is None else {**made, "uuid": uuid}


def ask(client: httpx.Client, *parts: dict[str, Any], **fields: Any) -> httpx.Response:
    content = [*parts, {"type": "text", "text": "What is this?"}]
    body = {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 6}
    return client.post(URL, json={**body, **fields})


def said(response: httpx.Response) -> tuple[str, int]:
    assert response.status_code == 200, response.text
    body = response.json()
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]


@pytest.mark.parametrize("empty", [None, {}], ids=["null", "empty"])
def test_picture_named_before_is_seen_again(client: httpx.Client, empty: Any):
    whole = said(ask(client, part(data_url(41), "forty-one"), part(data_url(42))))
    named = {"type": "image_url", "image_url": empty, "uuid": "forty-one"}
    assert said(ask(client, named, part(data_url(42)))) == whole


def test_name_given_to_another_picture_is_that_one_from_then_on(client: httpx.Client):
    ask(client, part(data_url(43), "moving"))
    other = said(ask(client, part(data_url(44), "moving")))
    assert said(ask(client, part(None, "moving"))) == other


def test_name_of_another_salt_is_unknown(client: httpx.Client):
    ask(client, part(data_url(45), "mine"), cache_salt="a")
    response = ask(client, part(None, "mine"), cache_salt="b")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "unknown_media_uuid"
    assert error["param"] == "messages.0.content.0"


def test_name_of_another_key_is_unknown(engine: AsyncLLM):
    app = create_app(engine, ServerConfig(served_model_name=(NAME,), api_key=("one", "two")), model=NAME)
    with serving(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        client.headers["Authorization"] = "Bearer one"
        whole = said(ask(client, part(data_url(46), "mine")))
        assert said(ask(client, part(None, "mine"))) == whole
        client.headers["Authorization"] = "Bearer two"
        assert ask(client, part(None, "mine")).json()["error"]["code"] == "unknown_media_uuid"


def test_remembered_oldest_names_are_forgotten_first():
    remembered = RememberedMedia(max_bytes=100_000)

    def resolve(url: str | None, uuid: str) -> Any:
        (message,) = remembered.resolve([{"role": "user", "content": [part(url, uuid)]}], "", "")
        return message["content"][0]["image_url"]["url"]

    resolve("a" * 40_000, "a")
    resolve("b" * 40_000, "b")
    assert resolve(None, "a") == "a" * 40_000  # which makes it the newest
    resolve("c" * 40_000, "c")
    assert resolve(None, "a") == "a" * 40_000
    with pytest.raises(RequestError, match="known here by uuid 'b'"):
        resolve(None, "b")
    resolve("a" * 10_000, "a")
    resolve("d" * 40_000, "d")
    assert [resolve(None, name) for name in "acd"] == ["a" * 10_000, "c" * 40_000, "d" * 40_000]


def test_remembered_names_of_one_client_push_out_no_other_clients():
    remembered = RememberedMedia(max_bytes=1_000_000)

    def resolve(url: str | None, uuid: str, client: str, salt: str = "") -> Any:
        (message,) = remembered.resolve([{"role": "user", "content": [part(url, uuid)]}], client, salt)
        return message["content"][0]["image_url"]["url"]

    for i in range(4):
        resolve("q" * 40_000, f"{i}", "quiet")
        resolve("s" * 40_000, f"{i}", "loud", "small")
    for i in range(1000):
        resolve("l" * 50_000, f"{i}", "loud", "large")
    assert len(remembered) > 15
    for i in range(4):
        assert resolve(None, f"{i}", "quiet") == "q" * 40_000
        assert resolve(None, f"{i}", "loud", "small") == "s" * 40_000
    assert resolve(None, "999", "loud", "large") == "l" * 50_000
    with pytest.raises(RequestError):
        resolve(None, "0", "loud", "large")


def test_remembered_salts_without_number_are_forgotten_like_names():
    remembered = RememberedMedia()
    for i in range(1000):
        remembered.resolve([{"role": "user", "content": [part("x", "u")]}], "", f"{i}")
    assert len(remembered) == 256


@pytest.mark.parametrize("content", [None, "text", ["text"], [{"type": "text", "text": "x"}], [5]])
def test_remembered_messages_without_names_stay_as_they_are(content: Any):
    message = {"role": "user", "content": content}
    assert RememberedMedia().resolve([message, 7], "", "") == [message, 7]


def test_remembered_tiny_pictures_with_long_names_do_not_fill_the_memory():
    remembered = RememberedMedia(max_bytes=100_000)
    for i in range(1000):
        remembered.resolve([{"role": "user", "content": [part("x", f"{i}")]}], "", "s" * 50_000)
    assert len(remembered) < 3
    with pytest.raises(RequestError) as caught:
        remembered.resolve([{"role": "user", "content": [part("x", "u" * 10**6)]}], "", "")
    assert caught.value.param == "messages.0.content.0.uuid"
    assert len(str(caught.value)) < 200


def test_picture_named_in_another_spelling_is_the_same(client: httpx.Client):
    whole = said(ask(client, {"type": "input_image", "image_url": data_url(47), "uuid": "spelt"}))
    assert said(ask(client, part(None, "spelt"))) == whole
