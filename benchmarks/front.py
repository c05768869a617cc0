"""CPU seconds that the HTTP server's own process spends on a request, its engine and its media workers not counted.

    python benchmarks/front.py [--before OTHER/src] [--streams 32] [--requests 256] [--json FILE]

Starts ``opsin serve`` with an engine that computes nothing (``idle_engine.py``), and sends it the requests of W4: a
640x480 JPEG as base64 and a question, answered by a stream. Answers of one token tell what a request costs, answers of
64 what each further token adds. ``--before`` measures the sources of another checkout in turn with these, so that
figures of one run can be compared. Linux: the kernel counts the time of every thread.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import load
import pictures
import shapes
from processes import free_port, started
from served import wait_until_ready

from opsin.cli import environment

_HERE = Path(__file__).parent
_START_S = 120.0


def measure(port: int, name: str, pid: int, jpegs: Sequence[bytes], args: argparse.Namespace) -> dict[str, float]:
    """Figures of one server that runs: milliseconds of CPU per request, and microseconds per token."""
    numbers = itertools.count()

    def cost(tokens: int, count: int) -> tuple[dict[str, float], dict[str, Any]]:
        bodies = [
            load.body(name, jpeg, next(numbers), tokens) for jpeg in itertools.islice(itertools.cycle(jpegs), count)
        ]
        before_s = _cpu_s(pid)
        replies, seconds = asyncio.run(load.run(port, bodies, args.streams))
        after_s = _cpu_s(pid)
        cost_ms = {key: 1e3 * (after_s[key] - before_s[key]) / count for key in before_s}
        return cost_ms, load.summary(args.streams, replies, seconds, 0.0)

    cost(args.tokens, args.streams)  # warm
    one_ms, _ = cost(1, args.requests)
    all_ms, summary = cost(args.tokens, args.requests)
    return {
        "request_ms": one_ms["all"],
        "request_loop_ms": one_ms["loop"],
        "token_us": 1e3 * (all_ms["all"] - one_ms["all"]) / (args.tokens - 1),
        "token_loop_us": 1e3 * (all_ms["loop"] - one_ms["loop"]) / (args.tokens - 1),
        "stream_ms": all_ms["all"],
        "ttft_p50_ms": summary["ttft_p50_ms"],
        "tpot_p50_ms": summary["tpot_p50_ms"],
        "tpot_p99_ms": summary["tpot_p99_ms"],
        "req_s": summary["req_s"],
    }


def _cpu_s(pid: int) -> dict[str, float]:
    """Seconds on a core: of the event loop's thread, which is the first, and of all threads."""
    times = {
        int(task.name): int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()
    }
    return {"loop": times[pid] / 1e9, "all": sum(times.values()) / 1e9}


def _serve(sources: Path, model: Path, jpegs: Sequence[bytes], args: argparse.Namespace) -> dict[str, float]:
    port, log = free_port(), Path(tempfile.gettempdir()) / "opsin-benchmarks" / "front.log"
    engine = [sys.executable, str(_HERE / "idle_engine.py"), str(args.step_ms)]
    command = [*engine, "serve", str(model), "--load-format", "dummy", "--host", "127.0.0.1", "--port", str(port)]
    with started(command, {"PYTHONPATH": os.pathsep.join((str(sources), str(_HERE)))}, log) as process:
        name = wait_until_ready(port, process, time.monotonic() + _START_S)
        return measure(port, name, process.pid, jpegs, args)


def _median(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(figures[key] for figures in rounds), 3) for key in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="src of another checkout, to be compared with this one's")
    parser.add_argument("--streams", type=int, default=32, help="at once")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=15.0, help="between two tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sources = {"before": args.before} if args.before is not None else {}
    sources["now"] = _HERE.parent / "src"
    rounds: dict[str, list[dict[str, float]]] = {key: [] for key in sources}
    with tempfile.TemporaryDirectory() as scratch:
        model = shapes.write_shape(Path(scratch), "qwen2vl-2b")
        jpegs = [path.read_bytes() for path in pictures.make(Path(scratch), "front", 32, pictures.VGA)]
        for _ in range(args.rounds):
            for key, source in sources.items():
                rounds[key].append(_serve(source, model, jpegs, args))
                print(key, json.dumps(_median(rounds[key][-1:])), flush=True)
    figures = {key: _median(values) for key, values in rounds.items()}
    if args.before is not None:
        costs = {key: value for key, value in figures["now"].items() if key != "req_s"}
        figures["ratio"] = {key: round(figures["before"][key] / value, 2) for key, value in costs.items() if value}
    report = {"command": shlex.join(["python", *sys.argv]), **figures, "environment": environment.collect()}
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
