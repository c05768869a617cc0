"""W4: streams of requests against servers, opsin's and vLLM's, started here one after the other.

    python benchmarks/served.py [--engines opsin,vllm-tuned] [--shape qwen2vl-2b] [--json FILE]
    python benchmarks/served.py --port 8000 --model NAME    # a server that runs already

``--load`` is STREAMS:REQUESTS:TOKENS, several of them after one another. Each stream sends one request after another: a
640x480 picture that nobody else shows as base64 JPEG, a question, a streamed answer. The clock of a request starts when
it is sent. Servers are warmed up first, have a port of their own and are killed with all that they started; vLLM runs
as its defaults have it ("vllm") or with four API servers ("vllm-tuned"). ``--text-only`` leaves the pictures out: the
difference is what others' pictures cost an answer that goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shlex
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import load
import pictures
import shapes
from offline import ENGINES, limits, names, peer_environment
from processes import free_port, is_open, say, started, tail
from tables import Figure, side_by_side

from opsin.cli import environment

_WARM = "16:48:16"
_LOOK_S = 0.1


class Load(NamedTuple):
    streams: int
    requests: int
    tokens: int

    @classmethod
    def read(cls, text: str) -> Load:
        parts = text.split(":")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise argparse.ArgumentTypeError(f"'{text}' is not STREAMS:REQUESTS:TOKENS, such as 32:256:64")
        return cls(*map(int, parts))


def main() -> None:
    args = _arguments()
    begun_s = time.monotonic()
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "shape": args.shape,
        "engines": {},
        "environment": environment.collect(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        images = args.pictures or Path(scratch) / "pictures"
        models = args.models or Path(scratch) / "models"
        loads = [args.warm, *args.load]
        pictures.make_sets(images, {f"w4{number}": (item.requests, pictures.VGA) for number, item in enumerate(loads)})
        say(begun_s, "the pictures are there")
        if args.port:
            figures = report["engines"]["server"] = {}
            _measure(args, args.port, args.model, images, figures, begun_s)
        else:
            folder = shapes.write_shape(models, args.shape, tiny=args.tiny)
            for engine in args.engines:
                figures = report["engines"][engine] = {}
                _serve(args, engine, folder, images, figures, begun_s)
                _write(args.json, report)
        _write(args.json, report)
    print(side_by_side(list(_figures(args.load)), report["engines"]))


def command(engine: str, model: Path, port: int, args: argparse.Namespace) -> list[str]:
    """What starts a server."""
    common = ["serve", str(model), "--load-format", "dummy", "--host", "127.0.0.1", "--port", str(port)]
    if engine == "opsin":
        return [sys.executable, "-m", "opsin", *common, *args.opsin_flags]
    tuned = ["--api-server-count", "4"] if engine == "vllm-tuned" else []
    program = [args.vllm_python or sys.executable, "-m", "vllm.entrypoints.cli.main"]
    return [*program, *common, "--served-model-name", model.name, *tuned, *args.vllm_flags]


def _serve(
    args: argparse.Namespace, engine: str, model: Path, images: Path, figures: dict[str, Any], begun_s: float
) -> None:
    """Start a server, put it under load, and see it gone."""
    port, log = free_port(), args.logs / f"served-{engine}.log"
    deadline_s = time.monotonic() + args.limits.get(engine, args.limits["default"])
    start_s = time.monotonic()
    try:
        with started(command(engine, model, port, args), peer_environment(engine, args.vllm_path), log) as process:
            name = wait_until_ready(port, process, deadline_s)
            figures["ready_s"] = round(time.monotonic() - start_s, 1)
            say(begun_s, f"{engine}: ready after {figures['ready_s']} s")
            _measure(args, port, name, images, figures, begun_s, deadline_s)
            figures["status"] = "done"
    except (OSError, RuntimeError, EOFError) as error:
        figures["status"] = "failed"
        say(begun_s, f"{engine}: {type(error).__name__}: {error}; its log ends with\n{tail(log)}")
    assert not is_open(port), f"port {port} is still open: something answers for a server that was killed"


def wait_until_ready(port: int, process: Any, deadline_s: float) -> str:
    """The name of the model that is served."""
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit status {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as answer:
                return json.load(answer)["data"][0]["id"]
        except (OSError, ValueError):  # not up yet, or not ready
            time.sleep(_LOOK_S)
    raise TimeoutError("it is not ready within its time")


def _measure(
    args: argparse.Namespace,
    port: int,
    model: str,
    images: Path,
    figures: dict[str, Any],
    begun_s: float,
    deadline_s: float = float("inf"),
) -> None:
    """Add what each load brought to ``figures``, as it comes."""
    numbers = itertools.count()
    for index, item in enumerate([args.warm, *args.load]):
        jpegs = [path.read_bytes() for path in sorted(images.glob(f"w4{index}_*.jpg"))][: item.requests]
        shown = [None] * item.requests if args.text_only else jpegs
        bodies = [load.body(model, jpeg, next(numbers), item.tokens) for jpeg in shown]
        left_s = deadline_s - time.monotonic()
        client_s = _cpu_s()
        replies, elapsed_s = asyncio.run(
            asyncio.wait_for(load.run(port, bodies, item.streams), None if left_s == float("inf") else max(1.0, left_s))
        )
        wrong = next((reply for reply in replies if reply.tokens != item.tokens), None)
        if wrong is not None:
            raise RuntimeError(f"an answer has {wrong.tokens} tokens instead of {item.tokens}")
        if index:
            row = load.summary(item.streams, replies, elapsed_s, _cpu_s() - client_s)
            say(begun_s, json.dumps(row))
            figures |= {f"{item.streams} {name}": value for name, value in row.items() if name != "streams"}


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def _figures(loads: list[Load]) -> Iterator[Figure]:
    for item in loads:
        for name, title, is_rate in (
            ("req_s", "requests/s", True),
            ("ttft_p50_ms", "first token p50, ms", False),
            ("ttft_p99_ms", "first token p99, ms", False),
            ("tpot_p50_ms", "each token p50, ms", False),
            ("tpot_p99_ms", "each token p99, ms", False),
            ("client_cpu", "cores of the client", None),
        ):
            yield Figure(f"{item.streams} {name}", f"W4, {item.streams} streams: {title}", is_rate)
    yield Figure("ready_s", "process start to ready, s", False)
    yield Figure("status", "ended", None)


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _loads(text: str) -> list[Load]:
    return [Load.read(part) for part in text.split(",")]


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=names(ENGINES), default=["opsin"], help="in the order in which they run")
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="qwen2vl-2b")
    parser.add_argument("--load", type=_loads, default=_loads("1:12:128,32:256:64,128:512:64"))
    parser.add_argument("--warm", type=Load.read, default=Load.read(_WARM), help="what is sent before, uncounted")
    parser.add_argument("--limits", type=limits, default=limits("300"), help="seconds: 300, or opsin=120,vllm=300")
    parser.add_argument("--text-only", action="store_true", help="the questions without pictures, to compare with")
    parser.add_argument("--port", type=int, help="a server that runs already")
    parser.add_argument("--model", default="model", help="its name at that server")
    parser.add_argument("--opsin-flags", type=shlex.split, default=[], help="more of opsin's flags, in one string")
    parser.add_argument("--vllm-flags", type=shlex.split, default=[], help="more of vLLM's flags, in one string")
    parser.add_argument("--vllm-path", help="PYTHONPATH of vLLM's processes, where it is not installed beside opsin")
    parser.add_argument("--vllm-python", help="the Python of vLLM's processes, if it has one of its own")
    parser.add_argument("--models", type=Path, help="where model folders are written; a temporary one by default")
    parser.add_argument("--pictures", type=Path, help="where pictures are kept; a temporary folder by default")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "opsin-benchmarks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for a dry run on a CPU")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
