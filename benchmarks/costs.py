"""How opsin's cost grows: with pictures per request, their size, requests at once, and the length of the text.

    python benchmarks/costs.py [--shape qwen2vl-2b] [--tables pictures,size,batch,context] [--json FILE]

One engine, one thing changed at a time: the others stay at one 448x448 picture, 16 requests, a question of some 40
tokens and 16 tokens out. Every row is asked once to warm up and once for the clock, on pictures that no other row has.
A row costs what it should when its time per unit stays, or falls, as the unit grows.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import shapes
from offline import names

from opsin import LLM, SamplingParams
from opsin.cli import environment
from opsin.cli.synthetic import photo

_SIGN = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Load:
    """What one row asks."""

    num_pictures: int = 1
    side: int = 448
    num_requests: int = 16
    num_words: int = 0
    tokens: int = 16


TABLES = ("pictures", "size", "batch", "context")


def rows_of(table: str, base: Load, *, tiny: bool) -> list[Load]:
    """The loads of a table; fewer and smaller ones for a dry run."""
    steps = {
        "pictures": ("num_pictures", (0, 1, 2, 4, 8)),
        "size": ("side", (224, 448, 896, 1344)),
        "batch": ("num_requests", (1, 4, 16, 64, 256)),
        "context": ("num_words", (0, 512, 2048, 6144)),
    }
    name, values = steps[table]
    return [replace(base, **{name: value}) for value in (values[:3] if tiny else values)]


def requests(shape: str, load: Load, seed: int) -> list[Any]:
    """Prompts with pictures that no other seed has."""
    made: list[Any] = []
    for index in range(load.num_requests):
        sign = "<image>" if shape.startswith("llava") else _SIGN
        text = " picture" * load.num_words
        prompt = shapes.prompt(shape, index).replace(sign, sign * load.num_pictures + text)
        jpegs = [photo(load.side, load.side, seed=(seed, index, picture)) for picture in range(load.num_pictures)]
        made.append({"prompt": prompt, **({"multi_modal_data": {"image": jpegs}} if jpegs else {})})
    return made


def measured(llm: LLM, shape: str, load: Load, seed: int) -> dict[str, Any]:
    """Seconds of one call, and what they come to per request, picture and prompt token."""
    params = SamplingParams(temperature=0, max_tokens=load.tokens, ignore_eos=True)
    llm.generate(requests(shape, load, seed), params, use_tqdm=False)
    asked = requests(shape, load, seed + 1)
    begun_s = time.perf_counter()
    outputs = llm.generate(asked, params, use_tqdm=False)
    elapsed_s = time.perf_counter() - begun_s
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_pictures = load.num_pictures * load.num_requests
    return {
        **asdict(load),
        "prompt_tokens": num_tokens // load.num_requests,
        "ms_per_request": round(1e3 * elapsed_s / load.num_requests, 2),
        "ms_per_picture": round(1e3 * elapsed_s / num_pictures, 2) if num_pictures else None,
        "us_per_prompt_token": round(1e6 * elapsed_s / num_tokens, 1),
        "requests_per_s": round(load.num_requests / elapsed_s, 2),
    }


def lines_of(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "  ".join(f"{name:>{len(name)}}" for name in rows[0])
    for row in rows:
        yield "  ".join(f"{'-' if value is None else value:>{len(name)}}" for name, value in row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="qwen2vl-2b")
    parser.add_argument("--tables", type=names(TABLES), default=list(TABLES))
    parser.add_argument("--settings", type=json.loads, default={}, help="more of opsin's settings, as JSON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toy shapes and few rows, for a dry run on a CPU")
    args = parser.parse_args()
    base = Load(side=112, num_requests=2, tokens=4) if args.tiny else Load()
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "shape": args.shape, "tables": {}}
    with tempfile.TemporaryDirectory() as scratch:
        model = shapes.write_shape(Path(scratch), args.shape, tiny=args.tiny)
        settings: Any = {"load_format": "dummy", "max_model_len": 8192, **args.settings}
        with LLM(str(model), **settings) as llm:
            for number, table in enumerate(args.tables):
                loads = rows_of(table, base, tiny=args.tiny)
                rows = [measured(llm, args.shape, load, 1000 * number + 2 * row) for row, load in enumerate(loads)]
                report["tables"][table] = rows
                print(f"\n{table}", *lines_of(rows), sep="\n", flush=True)
    if args.json:
        report["environment"] = environment.collect()
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
