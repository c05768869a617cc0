"""``opsin bench``: measure an engine with pictures nobody has to download.

Requests go through ``AsyncLLM`` as a server's would. Every report names its command, commit, device and versions.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from opsin.cli import environment
from opsin.cli.flags import Parser, add_engine_flags, add_model_place, engine_settings
from opsin.errors import ConfigError
from opsin.params import SamplingParams

if TYPE_CHECKING:
    import opsin
    from opsin.cli.flags import Commands

_PERCENTILES = (50, 90, 99)
_WORDS = "the picture shows a small street with red roofs and people who walk between tall trees under grey clouds"


class Timeline(NamedTuple):
    """When one request was sent, got its first token and was done (seconds), and what it held."""

    sent_s: float
    first_s: float
    done_s: float
    prompt_tokens: int
    output_tokens: int


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        usage="opsin bench throughput|latency [options] [MODEL]",
        help="measure throughput or latency",
        description="Measure an engine on synthetic, photo-like pictures made from --seed.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(
        prog="opsin bench", title="measurements", metavar="KIND", required=True, parser_class=Parser
    )
    throughput = kinds.add_parser(
        "throughput",
        usage="opsin bench throughput [options] [MODEL]",
        help="many requests at once",
        description="Send all requests at once and measure what comes out per second.",
        allow_abbrev=False,
    )
    latency = kinds.add_parser(
        "latency",
        usage="opsin bench latency [options] [MODEL]",
        help="one batch at a time",
        description="Send one batch after another and measure how long each answer takes.",
        allow_abbrev=False,
    )
    for kind, function in ((throughput, execute_throughput), (latency, execute_latency)):
        add_model_place(kind)
        section = kind.add_argument_group("load")
        if kind is throughput:
            section.add_argument(
                "--num-prompts", type=_positive, default=32, metavar="N", help="Requests (default: 32)."
            )
        else:
            section.add_argument("--batch-size", type=_positive, default=1, metavar="N", help="Requests (default: 1).")
            section.add_argument("--num-iters", type=_positive, default=10, metavar="N", help="Batches (default: 10).")
        for name, default, help in (
            ("num-warmup", 1, "Requests sent before anything is timed (default: 1)."),
            ("images-per-prompt", 1, "Pictures in each request (default: 1)."),
            ("input-len", 32, "Words of text in each request (default: 32)."),
            ("output-len", 32, "Tokens of each answer, end tokens ignored (default: 32)."),
        ):
            kind_of = _positive if name == "output-len" else _count
            section.add_argument(f"--{name}", type=kind_of, default=default, metavar="N", help=help)
        section.add_argument(
            "--image-size",
            type=_size,
            default=(640, 480),
            metavar="WxH",
            help="Size of the pictures (default: 640x480).",
        )
        section.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
        section.add_argument(
            "--output-json", metavar="FILE", default=argparse.SUPPRESS, help="Also write the JSON here."
        )
        section.add_argument("--profile", action="store_true", help="Also say where the time went, stage by stage.")
        section.add_argument(
            "--trace",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="Write what happened when, for Perfetto or chrome://tracing.",
        )
        section.add_argument("-q", "--quiet", action="store_true", help="Print the result alone.")
        add_engine_flags(kind)
        kind.set_defaults(function=function, parser=kind)


def execute_throughput(args: argparse.Namespace) -> int:
    return _measure(args, batch_size=args.num_prompts, num_batches=1)


def execute_latency(args: argparse.Namespace) -> int:
    return _measure(args, batch_size=args.batch_size, num_batches=args.num_iters)


def _measure(args: argparse.Namespace, *, batch_size: int, num_batches: int) -> int:
    from opsin.cli import tracing
    from opsin.cli.session import Session

    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, min_tokens=args.output_len, ignore_eos=True)
    make = _request_maker(args)
    num_timed = batch_size * num_batches
    warmup = [make(num_timed + index) for index in range(args.num_warmup)]
    batches = [[make(batch * batch_size + row) for row in range(batch_size)] for batch in range(num_batches)]
    with Session(engine_settings(args)) as session:
        session.call(_send(session.llm, warmup, params))
        watched = tracing.watching() if args.profile or "trace" in args else contextlib.nullcontext()
        with watched as recorder:
            started = time.perf_counter()
            timelines = [line for batch in batches for line in session.call(_send(session.llm, batch, params))]
            elapsed = time.perf_counter() - started
    report = {
        "command": shlex.join(["opsin", *args.argv]),
        "model": getattr(args, "model", "demo"),
        "images_per_prompt": args.images_per_prompt,
        "image_size": "x".join(map(str, args.image_size)),
        **summarise(timelines, elapsed, args.images_per_prompt),
        "environment": environment.collect(),
    }
    profile = {"profile": tracing.breakdown(recorder)} if recorder is not None and args.profile else {}
    if recorder is not None and "trace" in args:
        with _writing("--trace", args.trace) as path:
            recorder.write(path)
    if "output_json" in args:
        with _writing("--output-json", args.output_json) as path:
            path.write_text(json.dumps(report | profile, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(report | profile))
        return 0
    print(environment.table(report))
    if profile:
        print("\n" + tracing.render(profile["profile"]))
    return 0


@contextlib.contextmanager
def _writing(flag: str, path: str) -> Iterator[Path]:
    """The path to write to; what goes wrong there is the flag's fault."""
    try:
        yield Path(path)
    except OSError as error:
        raise ConfigError(f"Cannot write {flag} {path}: {error.strerror}.") from error


def summarise(timelines: Sequence[Timeline], elapsed_s: float, images_per_prompt: int) -> dict[str, Any]:
    """Rates over the whole run, and percentiles over its requests.

    ``tpot_ms`` is the time per output token after the first; requests of one token have none.
    """
    output_tokens = sum(line.output_tokens for line in timelines)
    return {
        "requests": len(timelines),
        "elapsed_s": round(elapsed_s, 4),
        "requests_per_s": round(len(timelines) / elapsed_s, 3),
        "images_per_s": round(len(timelines) * images_per_prompt / elapsed_s, 3),
        "prompt_tokens_per_s": round(sum(line.prompt_tokens for line in timelines) / elapsed_s, 1),
        "output_tokens_per_s": round(output_tokens / elapsed_s, 1),
        "prompt_tokens": sum(line.prompt_tokens for line in timelines),
        "output_tokens": output_tokens,
        "ttft_ms": _spread([line.first_s - line.sent_s for line in timelines]),
        "tpot_ms": _spread(
            [(line.done_s - line.first_s) / (line.output_tokens - 1) for line in timelines if line.output_tokens > 1]
        ),
        "latency_ms": _spread([line.done_s - line.sent_s for line in timelines]),
    }


def _spread(seconds: Sequence[float]) -> Mapping[str, float] | None:
    import numpy as np

    if not seconds:
        return None
    milliseconds = np.asarray(seconds) * 1000
    values = {"mean": milliseconds.mean(), **{f"p{q}": np.percentile(milliseconds, q) for q in _PERCENTILES}}
    return {name: round(float(value), 2) for name, value in values.items()}


async def _send(
    llm: opsin.AsyncLLM, requests: Sequence[list[dict[str, Any]]], params: SamplingParams
) -> list[Timeline]:
    """Send requests at the same time; returns when all are done."""

    async def one(messages: list[dict[str, Any]], request_id: str) -> Timeline:
        sent = time.perf_counter()
        first: float | None = None
        output = None
        async for output in llm.chat(messages, params, request_id=request_id):
            if first is None and output.outputs[0].token_ids:
                first = time.perf_counter()
        done = time.perf_counter()
        assert output is not None, "a stream without a single output"
        return Timeline(sent, first or done, done, len(output.prompt_token_ids), len(output.outputs[0].token_ids))

    stamp = time.monotonic_ns()
    return await asyncio.gather(*(one(messages, f"bench-{stamp}-{row}") for row, messages in enumerate(requests)))


def _request_maker(args: argparse.Namespace) -> Callable[[int], list[dict[str, Any]]]:
    from opsin.cli.synthetic import photo

    width, height = args.image_size
    seed = getattr(args, "seed", 0)
    words = _WORDS.split()

    def make(index: int) -> list[dict[str, Any]]:
        """The messages of the ``index``-th request; no two share a picture."""
        parts: list[dict[str, Any]] = []
        for picture in range(args.images_per_prompt):
            data = photo(width, height, seed=(seed, index, picture))
            url = "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
            parts.append({"type": "image_url", "image_url": {"url": url}})
        text = " ".join(words[(index + word) % len(words)] for word in range(args.input_len))
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text or "?"}]}]

    return make


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be at least 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT, such as 640x480")
    return int(match[1]), int(match[2])
