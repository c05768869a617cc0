"""Offline workloads: opsin and, where it is installed, vLLM, on the same pictures in one call.

    python benchmarks/offline.py [--shape qwen2vl-2b] [--engines opsin,vllm-tuned,vllm] [--json FILE]

* w1: ``--n`` requests with one picture each, of mixed sizes, 64 tokens out;
* w2: one request at a time, 640x480, 128 tokens out: time to the first token, and per token after it;
* w3: ``--n`` requests with a picture of 1024x768 each, one token out;
* w5: ``--n`` / 4 pictures of mixed sizes, each asked four times, 64 tokens out;
* embed: ``--n`` vectors of a 1024x768 picture each; not together with others where vLLM takes part.

Every clock starts at encoded bytes, for every engine. Each engine has a process of its own and a time limit, random
weights, and is warmed up first. All but w2 run twice on different pictures; the better run counts. vLLM decodes in 16
threads inside the clock, and runs as its defaults have it ("vllm") and with HF's picture processor on the GPU
("vllm-tuned"); for both FlashInfer's sampler is off, which greedy decoding does not use and which takes minutes to
compile. Figures are printed, and written to ``--json``, as they come: what ends early keeps what it had.

``--profile FOLDER`` runs opsin's workloads once more and writes where the time went, with traces for Perfetto.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import shapes
import workloads
from processes import lines_until, say, started, tail
from tables import Figure, side_by_side
from worker import Task

from opsin.cli import environment

ENGINES = ("opsin", "vllm", "vllm-tuned")
FIGURES = (
    *(Figure(name, workload.title, True) for name, workload in workloads.WORKLOADS.items()),
    Figure("w2_first_ms", f"{workloads.STREAMED.title}: first token, ms", False),
    Figure("w2_token_ms", f"{workloads.STREAMED.title}: each token, ms", False),
    Figure("ready_s", "process start to first answer, s", False),
    Figure("w1_prompt_tokens", "prompt tokens, W1", None),
    Figure("w3_prompt_tokens", "prompt tokens, W3", None),
    Figure("status", "ended", None),
)


def main() -> None:
    args = _arguments()
    begun_s = time.monotonic()
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "shape": args.shape,
        "requests": args.n,
        "engines": {},
        "environment": environment.collect(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        models = args.models or Path(scratch) / "models"
        images = args.pictures or Path(scratch) / "pictures"
        shapes.write_shape(models, args.shape, tiny=args.tiny)
        workloads.make_pictures(images, args.workloads, args.n, extra_runs=2 if args.profile else 0)
        say(begun_s, "the pictures are there")
        for engine in args.engines:
            settings = args.settings if engine == "opsin" else args.vllm_settings
            profile = str(args.profile) if args.profile and engine == "opsin" else None
            task = Task(engine, args.shape, str(models), str(images), args.workloads, settings, profile)
            figures = report["engines"][engine] = {"settings": settings}
            for news in _run(task, args, begun_s, figures):
                say(begun_s, f"{engine}: {json.dumps(news)}")
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(side_by_side(FIGURES, report["engines"]))


def _run(task: Task, args: argparse.Namespace, begun_s: float, figures: dict[str, Any]) -> Any:
    """Run a worker; yields what it says as it says it, and adds it to ``figures``."""
    log = args.logs / f"{task.engine}.log"
    deadline_s = time.monotonic() + args.limits.get(task.engine, args.limits["default"])
    command = [args.vllm_python if task.engine != "opsin" and args.vllm_python else sys.executable]
    command += [str(Path(__file__).with_name("worker.py")), task.to_json()]
    with started(command, peer_environment(task.engine, args.vllm_path), log, piped=True) as process:
        for line in lines_until(process, deadline_s):
            if line.startswith('{"'):
                news = json.loads(line)
                figures |= news
                yield news
        if process.poll() is None and time.monotonic() >= deadline_s:
            figures["status"] = "out of time"
        else:
            figures["status"] = "done" if process.wait() == 0 else f"exit {process.returncode}"
    if figures["status"] != "done":
        say(begun_s, f"{task.engine}: {figures['status']}; its log ends with\n{tail(log)}")
    yield {"status": figures["status"]}


def peer_environment(engine: str, vllm_path: str | None) -> Mapping[str, str]:
    """Variables of an engine's process."""
    if engine == "opsin":
        return {}
    path = {"PYTHONPATH": vllm_path} if vllm_path else {}
    return {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **path}


def limits(text: str) -> dict[str, float]:
    """``300`` for every engine, or ``opsin=120,vllm=300``; ``default`` is that of engines which are not named."""
    given: dict[str, float] = {"default": 400.0}
    for part in text.split(","):
        name, is_named, seconds = part.rpartition("=")
        if is_named and name not in ENGINES:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(ENGINES)}")
        given[name or "default"] = float(seconds)
    return given


def names(known: tuple[str, ...]) -> Any:
    """A type for argparse: comma-separated names out of ``known``."""

    def read(text: str) -> list[str]:
        wrong = next((name for name in text.split(",") if name not in known), None)
        if wrong is not None:
            raise argparse.ArgumentTypeError(f"'{wrong}' is none of {', '.join(known)}")
        return text.split(",")

    return read


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="qwen2vl-2b")
    parser.add_argument("--engines", type=names(ENGINES), default=["opsin"], help="in the order in which they run")
    parser.add_argument("--workloads", type=names(workloads.NAMES), default=["w1", "w3", "w5", "w2"])
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--limits", type=limits, default=limits("400"), help="seconds: 300, or opsin=120,vllm=300")
    parser.add_argument("--settings", type=json.loads, default={}, help="more of opsin's settings, as JSON")
    parser.add_argument("--vllm-settings", type=json.loads, default={}, help="more of vLLM's settings, as JSON")
    parser.add_argument("--vllm-path", help="PYTHONPATH of vLLM's processes, where it is not installed beside opsin")
    parser.add_argument("--vllm-python", help="the Python of vLLM's processes, if it has one of its own")
    parser.add_argument("--models", type=Path, help="where model folders are written; a temporary one by default")
    parser.add_argument("--pictures", type=Path, help="where pictures are kept; a temporary folder by default")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "opsin-benchmarks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="also write where opsin's time went")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for a dry run on a CPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
