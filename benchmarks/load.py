"""Streams of chat requests with pictures against a server, by a client too light to be what is measured."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import shapes


class Reply(NamedTuple):
    """Seconds to the first token, seconds in all, and how many tokens the server counted."""

    first_s: float
    total_s: float
    tokens: int


def body(model: str, jpeg: bytes | None, number: int, tokens: int) -> bytes:
    """A streamed chat request with one picture or none, ``tokens`` long whatever the model says."""
    content: list[dict[str, Any]] = [{"type": "text", "text": shapes.question(number)}]
    if jpeg is not None:
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(request).encode()


async def run(port: int, bodies: Sequence[bytes], streams: int) -> tuple[list[Reply], float]:
    """Send them all, so many at a time, one connection each; the replies, and the seconds that it took."""
    waiting = iter(bodies)
    begun_s = time.perf_counter()
    parts = await asyncio.gather(*(_stream(port, waiting) for _ in range(streams)))
    return list(itertools.chain.from_iterable(parts)), time.perf_counter() - begun_s


def summary(streams: int, replies: Sequence[Reply], elapsed_s: float, client_s: float) -> dict[str, Any]:
    """Rates and percentiles; ``client_cpu`` is the share of a core that the client used."""
    first = np.array([reply.first_s for reply in replies]) * 1e3
    each = np.array([(r.total_s - r.first_s) / max(1, r.tokens - 1) for r in replies]) * 1e3
    return {
        "streams": streams,
        "requests": len(replies),
        "req_s": round(len(replies) / elapsed_s, 2),
        "out_tok_s": round(sum(reply.tokens for reply in replies) / elapsed_s, 1),
        "ttft_p50_ms": round(float(np.percentile(first, 50)), 1),
        "ttft_p99_ms": round(float(np.percentile(first, 99)), 1),
        "tpot_p50_ms": round(float(np.percentile(each, 50)), 2),
        "tpot_p99_ms": round(float(np.percentile(each, 99)), 2),
        "client_cpu": round(client_s / elapsed_s, 2),
    }


async def _stream(port: int, bodies: Iterator[bytes]) -> list[Reply]:
    """One request after another over one connection, until none is left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        return [await _ask(reader, writer, body) for body in bodies]
    finally:
        writer.close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> Reply:
    begun_s = time.perf_counter()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    status = await reader.readline()
    headers = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b" 200 " not in status or b"chunked" not in headers:
        raise RuntimeError(f"The server answers {status!r}: {(await reader.read(2000)).decode(errors='replace')}")
    first_s, tokens = 0.0, 0
    async for event in _events(reader):
        # Most events need no parsing: after the one that names the role each tells of a token, with text or without.
        if not first_s and b'"content"' in event and b'"role"' not in event:
            first_s = time.perf_counter() - begun_s
        if b'"completion_tokens"' in event:
            tokens = json.loads(event)["usage"]["completion_tokens"]
    total_s = time.perf_counter() - begun_s
    return Reply(first_s or total_s, total_s, tokens)


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event in a chunked body, up to its end."""
    kept = b""
    while size := int(await reader.readline(), 16):
        kept += (await reader.readexactly(size + 2))[:-2]
        *whole, kept = kept.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                yield event[6:]
    await reader.readline()  # behind the last chunk
