"""What comes over the wire before any model is asked: keys, bodies, routes, errors in form."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route

from opsin import AsyncLLM
from opsin.errors import RequestError
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.decoding import decode
from opsin.server.gate import OPEN
from opsin.server.requests import ChatCompletionRequest
from tests.server.conftest import NAME, chat, serving

URL = "/v1/chat/completions"
KEYS = ("first key", "second-key")
CAP = 200_000


@pytest.fixture(scope="module")
def guarded(engine: AsyncLLM) -> FastAPI:
    return create_app(engine, ServerConfig(api_key=KEYS, max_body_bytes=CAP), model=NAME)


@pytest.fixture(scope="module")
def guarded_client(guarded: FastAPI) -> Iterator[httpx.Client]:
    with serving(guarded) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return error


def test_every_route_but_the_probes_and_the_page_asks_for_a_key(guarded: FastAPI, guarded_client: httpx.Client):
    paths = [route.path for route in guarded.router.routes if isinstance(route, Route)]
    assert {"/docs", "/openapi.json", "/metrics", URL, *OPEN} <= set(paths)
    for path in [*paths, "/no/such/route"]:
        statuses = {guarded_client.request(method, path).status_code for method in ("GET", "POST")}
        assert (statuses == {401}) != (path in OPEN), (path, statuses)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_lets_in(guarded_client: httpx.Client, key: str):
    assert guarded_client.get("/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "value",
    ["Bearer wrong", "Bearer", "", "Basic first key", "first key", "Bearer first", "Bearer schlüssel"],
)
def test_wrong_key_is_refused(guarded_client: httpx.Client, value: str):
    response = guarded_client.get("/v1/models", headers=[(b"Authorization", value.encode("utf-8"))])
    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nonsense",
        json.dumps(chat()).encode("utf-16"),
        b'{"messages": [], "temperature": NaN}',
        b'{"messages": [], "temperature": 1e999}',
        b'{"messages": ["\xff"]}',
        b'{"messages": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b'{"messages": [{"role": "user", "content": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_000 + b"}]}",
    ],
    ids=["empty", "cut", "list", "no json", "utf-16", "nan", "infinite", "latin-1", "deep lists", "deep objects"],
)
def test_body_that_is_no_request_is_refused(guarded_client: httpx.Client, body: bytes):
    response = guarded_client.post(URL, content=body, headers=bearer(KEYS[0]))
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"
    assert guarded_client.get("/v1/models", headers=bearer(KEYS[0])).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b'{"messages": [' + b",".join([b'{"role":"user","content":"x"}'] * 200_000) + b"]}", 400, "messages"),
        (b'{"messages": [], "chat_template_kwargs": {"a": [' + b"1," * 10**6 + b"1]}}", 400, None),
        (b'{"messages": [], "chat_template_kwargs": {"a": [' + b"1," * 10**7 + b"1]}}", 413, None),
    ],
    ids=["messages", "values", "megabytes of values"],
)
def test_body_of_countless_values_is_refused_at_once(client: httpx.Client, body: bytes, status: int, param: str | None):
    start_s = time.monotonic()
    response = client.post(URL, content=body)
    assert response.status_code == status
    assert error_of(response)["param"] == param
    assert time.monotonic() - start_s < 5  # decoded and looked at one by one, they take far longer


def test_words_of_a_prompt_do_not_count_as_messages(client: httpx.Client):
    text = '"role" ' * 5000
    assert client.post(URL, json=chat(text)).json()["error"]["code"] == "context_length_exceeded"


def test_body_over_the_cap_is_refused_before_it_is_read(guarded_client: httpx.Client):
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 500 * CAP:
            sent += 65536
            yield b" " * 65536

    try:
        response = guarded_client.post(URL, content=endless(), headers=bearer(KEYS[0]))
        assert response.status_code == 413
    except httpx.TransportError:
        pass  # the server has answered and closed while this client was still sending
    assert sent < 250 * CAP
    announced = guarded_client.post(URL, content=b" " * (CAP + 1), headers=bearer(KEYS[0]))
    assert announced.status_code == 413
    assert error_of(announced)["code"] == "request_too_large"


def test_compressed_body_is_refused(guarded_client: httpx.Client):
    headers = {**bearer(KEYS[0]), "Content-Encoding": "gzip"}
    response = guarded_client.post(URL, content=gzip.compress(b"0" * 10_000), headers=headers)
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_content_encoding"


def test_unknown_model_is_told_what_is_served(client: httpx.Client):
    response = client.post(URL, json=chat(model="gpt-9"))
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert NAME in error["message"]
    assert "alias" in error["message"]


def test_model_answers_to_every_name_and_to_none(client: httpx.Client):
    for model in (NAME, "alias", None):
        assert client.post(URL, json=chat(model=model)).json()["model"] == NAME


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/page", 404, "route_not_found"),
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("POST", "/debug", 404, "route_not_found"),
        ("GET", URL, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
def test_unknown_route_or_method_is_refused_in_form(
    client: httpx.Client, method: str, path: str, status: int, code: str
):
    response = client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code


def test_request_id_is_echoed_and_part_of_the_answers_id(client: httpx.Client):
    response = client.post(URL, json=chat(), headers={"X-Request-Id": "job-17"})
    assert response.headers["x-request-id"] == "job-17"
    assert response.json()["id"] == "chatcmpl-job-17"
    assert client.post(URL, json=chat(request_id="mine")).json()["id"] == "chatcmpl-mine"


def test_request_id_unfit_for_headers_is_replaced(client: httpx.Client):
    for name in ("x" * 500, "a b", "<script>"):
        echoed = client.get("/version", headers={"X-Request-Id": name}).headers["x-request-id"]
        assert echoed != name
        assert client.post(URL, json=chat(request_id=name)).json()["id"] != f"chatcmpl-{name}"


def test_same_request_id_twice_at_once_is_two_requests(client: httpx.Client):
    with client.stream("POST", URL, json=chat(stream=True, max_tokens=200, request_id="same")) as first:
        lines = first.iter_lines()
        next(lines)
        assert client.post(URL, json=chat(request_id="same")).status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_connection_goes_on_after_an_error(address: str, client: httpx.Client):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        bad = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n{"
        good = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        connection.sendall(bad + good)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.count(b"HTTP/1.1 400") == 1
    assert received.count(b"HTTP/1.1 200") == 1


def test_documentation_knows_the_bodies(client: httpx.Client):
    document = client.get("/openapi.json").json()
    body = document["paths"][URL]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert "messages" in schema["properties"]
    assert schema["required"] == ["messages"]
    assert client.get("/docs").status_code == 200


def test_logs_hold_no_prompts_pictures_or_keys(
    guarded_client: httpx.Client, caplog: pytest.LogCaptureFixture, client: httpx.Client
):
    caplog.set_level("INFO", logger="opsin")
    secret = "my secret words"
    body = chat(1, secret)
    guarded_client.post(URL + f"?q={'hidden'}", json=body, headers=bearer(KEYS[0]))
    guarded_client.post(URL, json=body, headers=bearer("guessed"))
    guarded_client.post(URL, json={**body, "n": "x"}, headers=bearer(KEYS[0]))
    text = caplog.text
    assert URL in text
    for word in (secret, "base64", KEYS[0], "guessed", "hidden"):
        assert word not in text


@pytest.mark.parametrize("depth", [200, 900, 100_000])
@pytest.mark.parametrize("field", ["tools", "tool_choice", "chat_template_kwargs", "messages", "guided_json", "stop"])
def test_body_that_is_nested_too_deeply_is_refused(client: httpx.Client, field: str, depth: int):
    opening, closing = ('[{"a":', "}]") if field in ("tools", "messages") else ('{"a":', "}")
    nested = opening + "[" * depth + "]" * depth + closing
    response = client.post(URL, content=f'{{"messages": [{{"role": "user", "content": "x"}}], "{field}": {nested}}}')
    assert response.status_code == 400


def test_body_of_countless_parts_is_refused_at_once(client: httpx.Client):
    parts = b",".join([b'{"type":"text","text":"x"}'] * 60_000)
    response = client.post(URL, content=b'{"messages": [{"role":"user","content":[' + parts + b"]}]}")
    assert error_of(response)["message"] == "The body has more than 32768 objects or lists."
    response = client.post(URL, content=b'{"messages": [' + b",".join([b"[1]"] * 60_000) + b"]}")
    assert error_of(response)["message"] == "The body has more than 32768 objects or lists."


def test_signs_within_data_urls_are_not_counted_and_behind_them_they_are():
    url = b'"data:text/plain,' + b"{[," * 300_000 + b'"'
    message = b'{"messages": [{"role": "user", "content": [%s, {"type": "text", "text": %s}]}]%s}'
    request = decode(message % (url, b'"x"', b""), ChatCompletionRequest)
    assert request.messages[0]["content"][0].encode() == url[1:-1]
    assert request.messages[0]["content"][1]["text"] == "x"
    with pytest.raises(RequestError, match="250000 values"):
        decode(message % (url, url, b', "stop": ["x"' + b', "x"' * 300_000 + b"]"), ChatCompletionRequest)
    with pytest.raises(RequestError, match="not valid JSON"):
        decode(b'{"messages": ["data:' + b"," * 300_000, ChatCompletionRequest)
