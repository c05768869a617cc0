"""Bodies that are cut up while they come mean what they mean when they are decoded whole."""

from __future__ import annotations

import base64
import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opsin.errors import RequestError
from opsin.server import bodies
from opsin.server.bodies import CutBody
from opsin.server.decoding import decode
from opsin.server.errors import BodyTooLargeError
from opsin.server.requests import ChatCompletionRequest
from tests.server.conftest import chat, data_url


@pytest.fixture
def tiny_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly every string is long, and is handled a few bytes at a time."""
    _use_tiny_steps(monkeypatch)


def _use_tiny_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bodies, "_LONG_BYTES", 32)  # longer than the names of fields
    patch.setattr(bodies, "_STEP_BYTES", 13)
    patch.setattr(bodies, "_BLOCK_CHARS", 20)


def cut(body: bytes, sizes: Iterator[int]) -> bodies.Body:
    cutter, at = CutBody(), 0
    while at < len(body):
        size = next(sizes)
        cutter.feed(body[at : at + size])
        at += size
    return cutter.finish()


def meaning(body: bytes, sizes: Iterator[int] | None = None) -> Any:
    """The request that is made of a body, or what is said of it, but for where in the bytes that is."""
    try:
        if sizes is None:
            request = decode(body, ChatCompletionRequest)
        else:
            text, strings = cut(body, sizes)
            request = decode(text, ChatCompletionRequest, strings)
        return msgspec.to_builtins(request)
    except RequestError as error:
        return re.sub(r"0x\w\w|[\d-]+", "#", str(error)), error.param


PIECES = st.sampled_from(
    [
        *('"', "\\", '\\"', "\\\\", "\\/", "\\n", "\\u", "\\u00", "\\u00e4", "\\ud83d", "\\ude00", "\\ud83d\\ude00"),
        *(
            "\\x",
            "ä",
            "€",
            "😀",
            "\x00",
            "\n",
            "data:image/png;base64,",
            "iVBORw0KGgo" * 3,
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
        ),
        *(
            '{"a":',
            '"messages":[',
            '"content":"',
            '"temperature":',
            '"x",',
            "1e5",
            "null",
            " " * 20,
            "a" * 9,
            "\\" * 15,
        ),
    ]
).map(str.encode) | st.sampled_from([b"\xff", b"\xe2\x82", b"\xf0", b"\x80", b"\xed\xa0\xbd"])

STRINGS = st.text() | st.lists(st.sampled_from(["😀", "ä", "\\", '"', "/", "\n", "data:,", "Zm9v" * 8])).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | STRINGS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(STRINGS, inner, max_size=4),
    max_leaves=12,
)
REQUESTS = st.fixed_dictionaries(
    {"messages": st.lists(st.dictionaries(STRINGS, VALUES, max_size=3), max_size=3)},
    optional={name: VALUES for name in ("user", "stop", "tools", "logit_bias", "temperature", "stream_options", "far")},
)


def written(request: Any, escapes: bool, php: bool) -> bytes:
    """As different clients write JSON; PHP escapes slashes."""
    text = json.dumps(request, ensure_ascii=escapes)
    return (text.replace("/", "\\/") if php else text).encode("utf-8", "surrogatepass")


BODIES = st.builds(written, REQUESTS, st.booleans(), st.booleans())
DAMAGED = st.builds(
    lambda body, at, piece, gone: body[: int(at * len(body))] + piece + body[int(at * len(body)) + gone :],
    BODIES,
    st.floats(0, 1),
    PIECES,
    st.integers(0, 9) | st.just(10**6),
)
SOUP = st.lists(PIECES, max_size=30).map(lambda pieces: b'{"messages":[{"content":"' + b"".join(pieces) + b'"}]}')


@settings(max_examples=400, deadline=None)
@given(BODIES | DAMAGED | SOUP, st.randoms(use_true_random=False))
@example(b'{"messages":[{"content":"' + b"\\ud83d\\ude00" * 20 + b'"}]}', random.Random(0))
@example(b'{"messages":[{"content":"' + b"\\\\ud83d\\\\" * 20 + b'"}]}', random.Random(0))
@example(b'{"messages":[{"content":"' + "a😀€".encode() * 20 + b'"}]}', random.Random(0))
@example(b'{"messages":[],"far":"' + b"a\\ud83d" * 20 + b'\\x\xff"}', random.Random(0))
@example(b'{"temperature":"' + b"x" * 40 + b'","messages":["' + b"\xff" * 40, random.Random(0))
@example(b'{"messages":["' + b"x" * 40 + b"\\\xff", random.Random(0))
def test_cut_body_means_what_it_means_whole(body: bytes, chance: random.Random):
    with pytest.MonkeyPatch.context() as patch:
        _use_tiny_steps(patch)
        assert meaning(body, iter(lambda: chance.randint(1, 40), 0)) == meaning(body)


@pytest.mark.usefixtures("tiny_steps")
def test_body_that_breaks_off_anywhere_is_said_to():
    body = '{"messages":[{"role":"user","content":"data:,äbcdefgh\\\\ud83d\\ud83d\\ude00/😀 and \\u00e4"}]}'.encode()
    for end in range(len(body) + 1):
        assert meaning(body[:end], iter(lambda: 7, 0)) == meaning(body[:end])


def test_long_strings_are_taken_out_and_short_ones_are_left():
    long = [base64.b64encode(bytes([i]) * 3200).decode() for i in range(200)]
    php = json.dumps(["////" * 2000, "a/b" * 9]).replace("/", "\\/").encode()
    body = b'{"messages":[],"stop":' + json.dumps(long).encode() + b',"tools":' + php + b"}"
    text, strings = cut(body, iter(lambda: 300_000, 0))
    assert list(strings.values()) == [*long, "////" * 2000]
    assert len(text) < 100 * len(strings)
    assert b"a\\/ba\\/b" in text
    assert meaning(body, iter(lambda: 300_000, 0)) == meaning(body)


def test_marks_of_another_body_are_mere_text():
    _, strings = cut(json.dumps({"messages": [{"content": "a" * 9000}]}).encode(), iter(lambda: 5000, 0))
    body = json.dumps({"messages": [{"content": ["b" * 9000, *strings]}]}).encode()
    assert meaning(body, iter(lambda: 5000, 0)) == meaning(body)


@pytest.mark.parametrize(
    "inside", ['"' + "€" * 2**21, '"' + "\\u00e4" * 2**21, "[" + "1, " * 2**20], ids=["wide", "escaped", "values"]
)
def test_text_that_no_context_holds_is_refused_early(monkeypatch: pytest.MonkeyPatch, inside: str):
    monkeypatch.setattr(bodies, "MAX_TEXT_BYTES", 2**20)
    with pytest.raises(BodyTooLargeError, match="beside base64"):
        cut(b'{"messages":[{"content":' + inside.encode(), iter(lambda: 2**16, 0))


def test_no_step_handles_more_of_a_large_body_than_a_piece(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    decode_json = msgspec.json.decode

    def watched(data: bytes, **options: Any) -> Any:
        sizes.append(len(data))
        return decode_json(data, **options)

    monkeypatch.setattr(msgspec.json, "decode", watched)
    part = {"type": "image_url", "image_url": {"url": "data:," + "a" * (40 * 2**20)}}
    body = json.dumps(chat(part)).encode()
    begun_s = time.thread_time()
    text, strings = cut(body, iter(lambda: 2**18, 0))
    assert time.thread_time() - begun_s < 2  # some 40 ms; a copy of all that came before for every piece takes seconds
    request = decode(text, ChatCompletionRequest, strings)
    assert max(sizes) < 2**17
    assert request.messages[0]["content"][0]["image_url"] == part["image_url"]


def test_request_of_many_pictures_is_answered_however_its_body_comes(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    body = json.dumps(
        chat("What is this?", 1, {"type": "image_url", "image_url": {"url": data_url(2, "BMP")}})
    ).encode()
    expected = client.post("/v1/chat/completions", content=body).json()
    cuts: list[int] = []
    finish = CutBody.finish

    def counted(self: CutBody) -> bodies.Body:
        body = finish(self)
        cuts.append(len(body.strings))
        return body

    monkeypatch.setattr(CutBody, "finish", counted)
    answer = client.post("/v1/chat/completions", content=(body[i : i + 1000] for i in range(0, len(body), 1000))).json()
    assert answer["choices"] == expected["choices"]
    assert cuts == [2]
