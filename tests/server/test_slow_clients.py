"""Clients that send or read too slowly, or whose heads are too long: bounded, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from opsin.server import protocol, transport
from opsin.server.transport import EventStream


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:  # closed with bytes of ours unread
        pass
    return received


@pytest.mark.parametrize("begun", [b"", b"GET /version HTTP/1.1\r\nHost: x\r\nX-Slow: "], ids=["silent", "half a head"])
def test_head_that_does_not_come_ends_the_connection(
    client: httpx.Client, address: str, monkeypatch: pytest.MonkeyPatch, begun: bytes
):
    monkeypatch.setattr(protocol, "_HEAD_S", 0.2)
    with connect(address) as connection:
        connection.sendall(begun)
        assert read_all(connection).startswith(b"HTTP/1.1 408")
    assert client.get("/version").status_code == 200


def test_idle_connection_outlives_the_deadline_of_a_head(
    client: httpx.Client, address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(protocol, "_HEAD_S", 0.1)
    request = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(address) as connection:
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_endless_head_is_refused(client: httpx.Client, address: str):
    with connect(address) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n")
        try:
            for i in range(1000):
                connection.sendall(b"X-%d: %s\r\n" % (i, b"a" * 1000))
        except ConnectionError:
            pass
        answer = read_all(connection)
    assert not answer or answer.startswith(b"HTTP/1.1 431")
    assert client.get("/version").status_code == 200


ENDLESS = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begun", "piece"),
    [
        (b"2\r\n{}\r\n0\r\nX: ", b"a" * 1000),
        (b"2\r\n{}\r\n0\r\n", b"X: y\r\n" * 200),
        (b"2;", b"a" * 1000),
    ],
    ids=["a trailer", "trailers", "a chunk's extension"],
)
def test_endless_rest_of_a_body_in_chunks_is_refused(client: httpx.Client, address: str, begun: bytes, piece: bytes):
    num_sent = 0
    with connect(address) as connection:
        try:
            connection.sendall(ENDLESS + begun)
            while num_sent < 100_000_000:  # what the kernel holds is little beside it
                connection.sendall(piece * 50)
                num_sent += 50 * len(piece)
        except ConnectionError:
            pass
        answer = read_all(connection)
    assert num_sent < 50_000_000
    assert not answer or answer.startswith(b"HTTP/1.1 431")
    assert client.get("/version").status_code == 200


def test_body_in_chunks_of_one_byte_is_a_body(client: httpx.Client, address: str):
    body = b" " * 30_000 + b'{"tokens": [1]}'
    with connect(address) as connection:
        head = ENDLESS.replace(b"/v1/completions", b"/detokenize").replace(
            b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200")


SMUGGLED = b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "data",
    [
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + SMUGGLED,
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + SMUGGLED,
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + SMUGGLED,
        POST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
        POST + b"Content-Length: +5\r\n\r\n" + SMUGGLED,
        POST + b"Transfer-Encoding: xchunked\r\n\r\n" + SMUGGLED,
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefghi\r\n" + SMUGGLED,
        POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n" + SMUGGLED,
        POST + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
        POST + b"X : a\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
        POST + b"X: a\0b\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + b"\0" * 154,
    ],
    ids=[
        *("length and chunks", "chunks and length", "two lengths", "negative length", "signed length"),
        *("unknown coding", "chunk longer than said", "endless chunk", "folded header", "space before colon"),
        *("NUL in header", "HTTP/2", "TLS"),
    ],
)
def test_request_of_two_meanings_is_refused_and_nothing_behind_it_answered(address: str, data: bytes):
    with connect(address) as connection:
        connection.sendall(data)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "head",
    [
        b"NONSENSE\r\n\r\n",
        b"BREW /pot HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["nonsense", "method", "path"],
)
def test_head_that_is_not_http_is_refused(client: httpx.Client, address: str, head: bytes):
    with connect(address) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith((b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 405"))
    assert client.get("/version").status_code == 200


def test_body_that_stops_coming_is_given_up(client: httpx.Client, address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "_BODY_IDLE_S", 0.2)
    with connect(address) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"request_timeout"' in answer


def test_body_that_comes_in_drops_is_given_up(client: httpx.Client, address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "_BODY_IDLE_S", 0.3)
    start_s = time.monotonic()
    with connect(address) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        connection.settimeout(0.05)
        answer = b""
        while not answer:
            assert time.monotonic() - start_s < 5
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408")


def test_client_that_stops_reading_its_stream_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "_SEND_IDLE_S", 0.05)
    closed: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"{}"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # the buffers are full for ever

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(EventStream(events())({"type": "http"}, receive, send), 5))
    assert closed == [True]


def test_stream_without_news_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "_PING_S", 0.01)
    sent: list[bytes] = []
    pinged = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        for number in (b"1", b"2"):
            yield b"data: " + number + b"\n\n"
            pinged.clear()
            await pinged.wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])
            if message["body"].startswith(b":"):
                pinged.set()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def run() -> int:
        before = len(asyncio.all_tasks())
        await EventStream(events())({"type": "http"}, receive, send)
        await asyncio.sleep(0)
        return len(asyncio.all_tasks()) - before

    assert asyncio.run(asyncio.wait_for(run(), 5)) == 0
    assert sent[0] == b"data: 1\n\n"
    assert sent[-1] == b""
    told = b"".join(sent)
    assert told.replace(b": ping\n\n", b"") == b"data: 1\n\ndata: 2\n\n"  # clients skip comments
    assert told.count(b": ping\n\n") >= 2
