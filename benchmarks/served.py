"""W4: streams of requests against a running OpenAI-style server, opsin's or another's.

    opsin serve MODEL --load-format dummy &
    python benchmarks/served.py --url http://127.0.0.1:8000 --streams 1,32,128 [--json FILE]

Each stream sends one request after another: a 640x480 picture that nobody else shows as base64 JPEG, a question, 64
tokens out, streamed. The clock of a request starts when it is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pictures
import shapes

from opsin.cli import environment


class Reply(NamedTuple):
    """Seconds to the first token, seconds in all, and how many tokens the server counted."""

    first_s: float
    total_s: float
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="its name at the server; the first that it lists by default")
    parser.add_argument("--streams", default="1,32,128")
    parser.add_argument("--requests-per-stream", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pictures", type=Path, help="where pictures are kept; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = asyncio.run(_measure(args))
    print(_table(rows))
    if args.json:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "rows": rows,
            "environment": environment.collect(),
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


async def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    sizes = [int(count) for count in args.streams.split(",")]
    total = sum(sizes) * args.requests_per_stream
    with tempfile.TemporaryDirectory() as scratch:
        files = pictures.make(args.pictures or Path(scratch), "served", total + 4, pictures.VGA)
        urls = ["data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode() for file in files]
    numbers = itertools.count()
    rows: list[dict[str, Any]] = []
    limits = httpx.Limits(max_connections=max(sizes))
    async with httpx.AsyncClient(base_url=args.url, timeout=600.0, limits=limits) as client:
        model = args.model or (await client.get("/v1/models")).json()["data"][0]["id"]
        for url in urls[total:]:
            await _ask(client, model, url, next(numbers), args.tokens)
        waiting = iter(urls[:total])
        for count in sizes:
            mine = list(itertools.islice(waiting, count * args.requests_per_stream))
            queue = iter(mine)
            begin = time.perf_counter()
            streams = [_stream(client, model, queue, numbers, args.tokens) for _ in range(count)]
            replies = [reply for part in await asyncio.gather(*streams) for reply in part]
            rows.append(_summary(count, replies, time.perf_counter() - begin))
    return rows


async def _stream(
    client: httpx.AsyncClient, model: str, urls: Iterator[str], numbers: Iterator[int], tokens: int
) -> list[Reply]:
    """One request after another, until none is left."""
    return [await _ask(client, model, url, next(numbers), tokens) for url in urls]


async def _ask(client: httpx.AsyncClient, model: str, url: str, number: int, tokens: int) -> Reply:
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": shapes.question(number)},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    first, counted = 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            sys.exit(f"The server answers {response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            choices = chunk.get("choices") or []
            # Random weights make tokens without text; any chunk after the one that names the role tells of one.
            if choices and not first and "content" in choices[0]["delta"] and not choices[0]["delta"].get("role"):
                first = time.perf_counter() - begin
            if chunk.get("usage"):
                counted = chunk["usage"]["completion_tokens"]
    took = time.perf_counter() - begin
    return Reply(first or took, took, counted)


def _summary(streams: int, replies: Sequence[Reply], elapsed: float) -> dict[str, Any]:
    first = np.array([reply.first_s for reply in replies]) * 1e3
    each = np.array([(r.total_s - r.first_s) / max(1, r.tokens - 1) for r in replies]) * 1e3
    return {
        "streams": streams,
        "requests": len(replies),
        "req_s": round(len(replies) / elapsed, 2),
        "out_tok_s": round(sum(reply.tokens for reply in replies) / elapsed, 1),
        "ttft_p50_ms": round(float(np.percentile(first, 50)), 1),
        "ttft_p99_ms": round(float(np.percentile(first, 99)), 1),
        "tpot_p50_ms": round(float(np.percentile(each, 50)), 2),
        "tpot_p99_ms": round(float(np.percentile(each, 99)), 2),
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["  ".join(f"{name:>11}" for name in names)]
    lines += ["  ".join(f"{row[name]:>11}" for name in names) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
