"""For how long a large body holds up the event loop of the HTTP server that reads it.

    python benchmarks/stalls.py [--before OTHER/src] [--mib 1 10 25 42 63] [--rounds 5] [--json FILE]

The server runs the demo model; each body asks about one picture of noise, sent as base64, so that nearly all of the
body is that picture. A task of the same loop wakes every millisecond and notes the longest time between two of its
turns, from the first byte to the answer; ``idle`` is the same for a loop that has nothing to do, as the machine's own
share.
``--before`` measures the sources of another checkout in turn with these.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image
from processes import free_port

from opsin import AsyncLLM
from opsin.cli import environment
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.listening import listen
from opsin.server.run import uvicorn_config

_HERE = Path(__file__).parent
_IDLE_S = 1.0
_LIMIT_S = 60.0


class _Heartbeat:
    """The longest time between two turns of the loop since it was last asked for."""

    def __init__(self) -> None:
        self._longest_s = 0.0

    async def beat(self) -> None:
        """For as long as the loop runs."""
        last_s = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now_s = time.perf_counter()
            self._longest_s = max(self._longest_s, now_s - last_s)
            last_s = now_s

    def longest_ms(self) -> float:
        """And begin anew."""
        longest_s, self._longest_s = self._longest_s, 0.0
        return 1e3 * longest_s


async def _serve_and_measure(paths: Sequence[Path]) -> dict[str, float]:
    """Milliseconds per body, from a server on this loop and a client in a process of its own."""
    config = ServerConfig(port=free_port())
    with AsyncLLM.spawn("demo", media_workers=1) as llm:
        app = create_app(llm, config, model="demo")
        server = uvicorn.Server(uvicorn_config(app, config))
        serving = asyncio.create_task(server.serve([listen(config)]))
        while not server.started:
            await asyncio.sleep(0.01)
        heart = _Heartbeat()
        beating = asyncio.create_task(heart.beat())
        figures: dict[str, float] = {}
        await _send(config.port, paths[0])  # warm
        heart.longest_ms()
        await asyncio.sleep(_IDLE_S)
        figures["idle"] = heart.longest_ms()
        for path in paths:
            await _send(config.port, path)
            figures[path.stem] = heart.longest_ms()
        beating.cancel()
        server.should_exit = True
        await serving
    return figures


async def _send(port: int, path: Path) -> None:
    command = [sys.executable, str(_HERE / "stalls.py"), "--client", str(port), str(path)]
    client = await asyncio.create_subprocess_exec(*command)
    if await asyncio.wait_for(client.wait(), _LIMIT_S):
        raise RuntimeError(f"the request of {path.name} was not answered")


def _post(port: int, path: Path) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT_S)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", path.read_bytes(), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read(500)!r}")


def _write_body(folder: Path, mib: int) -> Path:
    edge = int((mib * 2**20 * 3 / 4 / 3) ** 0.5)  # three bytes a pixel, not compressed, in base64
    pixels = np.random.default_rng(mib).integers(0, 256, (edge, edge, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    path = folder / f"{mib}_mib.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 1}))
    return path


def _round(source: Path, paths: Sequence[Path]) -> dict[str, float]:
    command = [sys.executable, str(_HERE / "stalls.py"), "--server", *map(str, paths)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(source), str(_HERE)))}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, timeout=10 * _LIMIT_S)
    return json.loads(done.stdout.splitlines()[-1])


def _least(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(min(figures[key] for figures in rounds), 1) for key in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="src of another checkout, to be compared with this one's")
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 10, 25, 42, 63], help="sizes of bodies")
    parser.add_argument("--rounds", type=int, default=5, help="the least counts: other programs only add to it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--server", type=Path, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        return _post(int(args.client[0]), Path(args.client[1]))
    if args.server is not None:
        return print(json.dumps(asyncio.run(_serve_and_measure(args.server))))
    sources = {"before": args.before} if args.before is not None else {}
    sources["now"] = _HERE.parent / "src"
    rounds: dict[str, list[dict[str, float]]] = {key: [] for key in sources}
    with tempfile.TemporaryDirectory() as scratch:
        paths = [_write_body(Path(scratch), mib) for mib in args.mib]
        for _ in range(args.rounds):
            for key, source in sources.items():
                rounds[key].append(_round(source, paths))
                print(key, json.dumps(_least(rounds[key][-1:])), flush=True)
    figures = {f"{key}_ms": _least(values) for key, values in rounds.items()}
    report = {"command": shlex.join(["python", *sys.argv]), **figures, "environment": environment.collect()}
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
