"""A server under pictures for a while: does anything break, grow, or hold up somebody else's tokens?

    python benchmarks/soak.py --requests 5000 --clients 8

Starts ``opsin serve demo``, and by turns streams a text canary alone and while clients flood the server with pictures
that no two requests share; reads ``/health`` all the time. Prints one JSON object. Linux, since it reads /proc. Flags
that it does not know go to the server.

Growth is measured after the caches are full: the KV pool is touched block by block, so its memory comes to be resident
only as prompts that nobody shares fill it, and the feature cache fills likewise.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import opsin

_CANARY_TOKENS = 64
_PROBE_S = 0.1
_POOLS = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "pictures_decoding")


@dataclass
class Seen:
    """What came back.

    Attributes:
        gaps_s: between the canary's tokens.
        health_s: what ``/health`` took.
        memory: requests done, and the resident MiB of the front, its engine and the media workers, at several times.
    """

    gaps_s: list[float] = field(default_factory=list[float])
    health_s: list[float] = field(default_factory=list[float])
    errors: list[str] = field(default_factory=list[str])
    memory: list[tuple[int, float, float, float]] = field(default_factory=list[tuple[int, float, float, float]])


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    host: str
    port: int
    pid: int

    async def ask(self, path: str, body: bytes = b"") -> AsyncIterator[tuple[float, bytes]]:
        """One request on a connection of its own: when each piece of the answer came, and the piece."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            while piece := await reader.read(2**16):
                yield time.perf_counter(), piece
        finally:
            writer.close()

    async def text(self, path: str, body: bytes = b"") -> str:
        return b"".join([piece async for _, piece in self.ask(path, body)]).decode()


@contextlib.contextmanager
def serving(flags: Sequence[str] = ()) -> Iterator[Server]:
    """``opsin serve demo`` on a port of its own."""
    command = [sys.executable, "-m", "opsin", "serve", "demo", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        seen = ""
        while (found := re.search(r"at http://([\d.]+):(\d+)", seen)) is None:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)  # the log's pipe has an end
        yield Server(found[1], int(found[2]), process.pid)
        process.terminate()
        process.wait(60)
        drain.wait(5)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def question(rng: np.random.Generator) -> bytes:
    """The body of a request about a picture of noise that no other picture equals."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=80)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in the picture?"}]
    return _body(content, max_tokens=12)


async def canary(server: Server, seen: Seen) -> None:
    """Stream one answer to a text, and note the time between its events."""
    body = _body("Tell me of the sea.", max_tokens=_CANARY_TOKENS, stream=True)
    last: float | None = None
    told = b""
    async for at, piece in server.ask("/v1/chat/completions", body):
        told += piece
        if b"data: " in piece:
            if last is not None:
                seen.gaps_s.append(at - last)
            last = at
    if b"[DONE]" not in told:
        seen.errors.append(told[-300:].decode(errors="replace"))


async def flood(server: Server, seen: Seen, questions: Iterator[tuple[int, bytes]]) -> None:
    """Ask about pictures, one after the other, until none is left."""
    for number, body in questions:
        told = await server.text("/v1/chat/completions", body)
        if not told.startswith("HTTP/1.1 200"):
            seen.errors.append(told[:300])
        if number % 100 == 0:
            seen.memory.append((number, *_memory_mib(server.pid)))


async def probe(server: Server, seen: Seen) -> None:
    """Read ``/health`` for as long as nobody stops it."""
    while True:
        begun = time.perf_counter()
        told = await server.text("/health")
        seen.health_s.append(time.perf_counter() - begun)
        if not told.startswith("HTTP/1.1 200"):
            seen.errors.append(told[:300])
        await asyncio.sleep(_PROBE_S)


async def run(server: Server, requests: int, clients: int, solo: int, seed: int) -> dict[str, Any]:
    """The whole measurement.

    Args:
        solo: canaries that run alone, by twos; the flood stops for them, since others may use the machine as well, and
            what they do to a canary they are to do to both kinds.
    """
    alone, among = Seen(), Seen()
    for _ in range(3):
        await canary(server, Seen())  # warm
    rng = np.random.default_rng(seed)
    # Made beforehand: the canary is read on this loop too, and what making pictures takes is not the server's.
    questions = iter([(number, question(rng)) for number in range(1, requests + 1)])
    probing = asyncio.create_task(probe(server, among))
    seconds = 0.0
    num_parts = max(1, solo // 2)
    for _ in range(num_parts):
        for _ in range(2):
            await canary(server, alone)
        begun = time.perf_counter()
        part = itertools.islice(questions, -(-requests // num_parts))
        floods = [asyncio.create_task(flood(server, among, part)) for _ in range(clients)]
        while not all(task.done() for task in floods):
            one = Seen()
            await canary(server, one)
            if not all(task.done() for task in floods) or not among.gaps_s:  # it was not alone towards its end
                among.gaps_s += one.gaps_s
                among.errors += one.errors
        await asyncio.gather(*floods)
        seconds += time.perf_counter() - begun
    probing.cancel()
    left = await _left(server)
    errors = [*alone.errors, *among.errors]
    p99 = [1e3 * float(np.quantile(seen.gaps_s, 0.99)) for seen in (alone, among)]
    return {
        "requests": requests,
        "clients": clients,
        "seconds": round(seconds, 1),
        "pictures_per_s": round(requests / seconds, 1),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "health_ms": {"p50": _ms(among.health_s, 0.5), "p99": _ms(among.health_s, 0.99), "max": _ms(among.health_s, 1)},
        "canary_gap_ms": {
            "alone": {"p50": _ms(alone.gaps_s, 0.5), "p99": round(p99[0], 2)},
            "among_pictures": {"p50": _ms(among.gaps_s, 0.5), "p99": round(p99[1], 2)},
        },
        "canary_p99_ratio": round(p99[1] / p99[0], 2),
        "front_mib_per_1000": _slope([(number, front) for number, front, _, _ in among.memory]),
        "engine_mib_per_1000": _slope([(number, engine) for number, _, engine, _ in among.memory]),
        "workers_mib_per_1000": _slope([(number, workers) for number, _, _, workers in among.memory]),
        "resident_mib": [
            [number, *map(round, mib)] for number, *mib in among.memory[:: max(1, len(among.memory) // 10)]
        ],
        "left_over": left,
        "loop_lag_above_25_ms": await _lag_share(server, "0.025"),
    }


def _body(content: Any, **fields: Any) -> bytes:
    message = {"role": "user", "content": content}
    return json.dumps({"model": "demo", "messages": [message], "temperature": 0, "ignore_eos": True, **fields}).encode()


async def _left(server: Server) -> dict[str, float]:
    """What the server still holds, a moment after the last answer; empty if all is given back."""
    left: dict[str, float] = {}
    for _ in range(30):
        text = await server.text("/metrics")
        found = {name: float(value) for name, value in re.findall(r"^\w+:(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}
        left = {name: found[name] for name in _POOLS if found[name]}
        if not left:
            break
        await asyncio.sleep(0.1)
    return left


async def _lag_share(server: Server, bound_s: str) -> float:
    """Share of the looks at which the event loop came round later than that."""
    text = await server.text("/metrics")
    counts = dict(re.findall(r'event_loop_lag_seconds_bucket\{.*le="([^"]+)"\} (\d+)', text))
    return round(1 - int(counts[bound_s]) / max(1, int(counts["+Inf"])), 4)


def _ms(seconds: Sequence[float], quantile: float) -> float:
    return round(1e3 * float(np.quantile(seconds, quantile)), 2)


def _slope(samples: Sequence[tuple[int, float]]) -> float | None:
    """Growth per 1,000 requests, over the last half: caches fill up at first.

    The median of the slopes between any two samples, so that one taken in the midst of a large step counts as one.
    """
    late = samples[len(samples) // 2 :]
    if len(late) < 3:
        return None
    pairs = itertools.combinations(late, 2)
    return round(1000 * float(np.median([(b - a) / (n - m) for (m, a), (n, b) in pairs if n > m])), 3)


def _children(pid: int) -> list[int]:
    direct = itertools.chain.from_iterable(
        map(int, task.read_text().split()) for task in Path(f"/proc/{pid}/task").glob("*/children")
    )
    return [process for child in direct for process in (child, *_children(child))]


def _memory_mib(pid: int) -> tuple[float, float, float]:
    """Resident MiB of the front, of the engine, and of all media workers."""
    engine = workers = 0.0
    for child in _children(pid):
        if b"opsin.engine" in Path(f"/proc/{child}/cmdline").read_bytes():
            engine += _resident_mib(child)
        else:
            workers += _resident_mib(child)
    return _resident_mib(pid), engine, workers


def _resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _circumstances(flags: Sequence[str], load_before: tuple[float, ...]) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", *sys.argv]),
        "server_flags": " ".join(flags),
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version()} | {"torch": version("torch"), "opsin": opsin.__version__},
        "cores": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average": [[round(one, 2) for one in load] for load in (load_before, os.getloadavg())],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--solo", type=int, default=20, help="canaries that run alone")
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    flags = ["--vision-cache-gb", "0.02", *flags]  # full after some hundred pictures, so that growth is growth
    before = os.getloadavg()
    with serving(flags) as server:
        result = asyncio.run(run(server, args.requests, args.clients, args.solo, args.seed))
    print(json.dumps(_circumstances(flags, before) | result, indent=2))
    sys.exit(1 if result["errors"] or result["left_over"] else 0)


if __name__ == "__main__":
    main()
