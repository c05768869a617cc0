"""What weights of 8 bits cost in quality and gain in speed, on one device.

    python benchmarks/quantized.py [--examples 120] [--json FILE]         how far the probabilities of tokens move
    python benchmarks/quantized.py --kernels [--json FILE]                what single products take, on a GPU

Quality: the demo model reads held-out questions with their true answers, and so do tiny models with random weights
(whose logits say nothing, which makes them the hardest). The divergence of each next token's distribution from that of
the same weights in half precision is averaged over the answers' positions: with FP8 everywhere, in the decoder alone,
in tower and projector alone, with INT8 everywhere, and with an FP8 KV cache alone. What half precision itself loses
against float32 stands beside it. The demo model also answers the questions by itself; the share of right answers is
shown for each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import shapes
import torch

from opsin import LLM, SamplingParams
from opsin.cli import environment
from opsin.cli.synthetic import photo
from opsin.demo.evaluate import Example, examples_of, score
from opsin.kernels import Kernels, quantized, select

KINDS = ("name", "shape", "color", "count", "read word", "caption")
RANDOM = ("llava-7b", "qwen2vl-7b", "qwen25vl-7b")
NUM_RANDOM = 12
STORED: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "FP8": {"quantization": "fp8"},
    "INT8": {"quantization": "int8"},
    "FP8 KV cache": {"kv_cache_dtype": "fp8"},
}
READ = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
ANSWER = SamplingParams(temperature=0, max_tokens=64)
PRODUCTS = {  # (out, in) of Qwen2-VL-7B
    "decoder qkv": (4608, 3584),
    "decoder o": (3584, 3584),
    "decoder gate_up": (37888, 3584),
    "decoder down": (3584, 18944),
    "tower qkv": (3840, 1280),
    "tower fc1": (5120, 1280),
    "tower fc2": (1280, 5120),
}
ROWS = (1, 2, 8, 16, 32, 128, 256, 2048, 8192)
COPIES = 8  # of each weight, in turn: the chip's cache holds none of them


class Case(NamedTuple):
    """Something to read: a prompt that ends with an answer of so many tokens, and its pictures."""

    prompt: Any
    num_answer_tokens: int


class Times(NamedTuple):
    """Microseconds of a product in bfloat16, of the same in FP8, and of quantising its rows for the latter."""

    bfloat16: float
    fp8: float
    quantise: float


class Reader:
    """An engine whose logits are kept."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.llm = LLM(model, media_workers=0, enable_prefix_caching=False, **settings)
        front: Any = self.llm._front
        self.model: Any = front.engine.core.executor._runner.model
        self._logits = self.model.logits
        self._kept: list[torch.Tensor] = []
        self.model.logits = self._keep

    def _keep(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        logits = self._logits(hidden_BD)
        self._kept.append(logits)
        return logits

    def read(self, case: Case) -> torch.Tensor:
        """Log-probabilities (answer tokens, V), float32."""
        self._kept.clear()
        (output,) = self.llm.generate(case.prompt, READ, use_tqdm=False)
        rows = torch.cat(self._kept)
        assert len(rows) == len(output.prompt_token_ids), "one row for each token of the prompt, in one step"
        return rows[-case.num_answer_tokens - 1 : -1].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=120, help="questions to the demo model")
    parser.add_argument("--kernels", action="store_true", help="time single products instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "environment": environment.collect()}
    if args.kernels:
        report["microseconds"] = products()
    else:
        report["models"] = quality(args.examples)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def quality(num_examples: int) -> dict[str, Any]:
    """Print and return divergences, in nats a token, by model and by what is quantised."""
    report: dict[str, Any] = {}
    each = max(1, num_examples // len(KINDS))
    examples = [example for kind in KINDS for example in examples_of(kind, each, seed=1)]
    report["demo"] = divergences("demo", lambda llm: [demo_case(llm, example) for example in examples])
    report["demo"] |= {f"right answers, {name}": share for name, share in right_answers(examples).items()}
    show("demo", report["demo"])
    with tempfile.TemporaryDirectory() as scratch:
        for name in RANDOM:
            folder = shapes.write_shape(Path(scratch), name, tiny=True)
            report[name] = divergences(
                str(folder), lambda _, name=name: random_cases(name), load_format="dummy", max_model_len=2048
            )
            show(f"{name}, tiny, random weights", report[name])
    return report


def show(title: str, figures: dict[str, Any]) -> None:
    print(title)
    for name, value in figures.items():
        print(f"  {name:<46}{value:.5f}", flush=True)


def demo_case(llm: LLM, example: Example) -> Case:
    answer = f" {example.answer}"
    prompt = {"prompt": example.prompt + answer, "multi_modal_data": {"image": list(example.pictures)}}
    return Case(prompt, len(llm.get_tokenizer().encode(answer, add_special_tokens=False)))


def random_cases(name: str) -> list[Case]:
    return [
        Case({"prompt": shapes.prompt(name, number), "multi_modal_data": {"image": photo(320, 240, number)}}, 16)
        for number in range(NUM_RANDOM)
    ]


def divergences(model: str, cases_of: Callable[[LLM], list[Case]], **settings: Any) -> dict[str, float]:
    """Mean Kullback-Leibler divergences of tokens' distributions, in nats."""
    half, *others = (Reader(model, dtype="bfloat16", **stored, **settings) for stored in STORED.values())
    cases = cases_of(half.llm)
    expected = [half.read(case) for case in cases]
    result: dict[str, float] = {}
    if "load_format" not in settings:  # random weights are other ones in float32
        exact = Reader(model, dtype="float32", **settings)
        result["bfloat16 from float32"] = mean_divergence((exact.read(case) for case in cases), expected)
        exact.llm.shutdown()
    tops = [rows.argmax(-1) for rows in expected]
    for title, reader in zip(list(STORED)[1:], others, strict=True):
        read = [reader.read(case) for case in cases]
        result[f"{title} from bfloat16"] = mean_divergence(expected, read)
        same = [(rows.argmax(-1) == top).float().mean() for rows, top in zip(read, tops, strict=True)]
        result[f"{title}: tokens with the same favourite, share"] = float(torch.stack(same).mean())
    for title, theirs in (("decoder alone", "decoder"), ("tower and projector alone", "")):
        mixed = Reader(model, dtype="bfloat16", quantization="fp8", **settings)
        for name, part in half.model.named_children():
            if (name == "decoder") != (theirs == "decoder"):
                setattr(mixed.model, name, part)
        result[f"FP8 in {title}"] = mean_divergence(expected, (mixed.read(case) for case in cases))
        mixed.llm.shutdown()
    result["spread of bfloat16's logits"] = statistics.mean(float(rows.std(-1).mean()) for rows in expected)
    for reader in (half, *others):
        reader.llm.shutdown()
    return result


def mean_divergence(p: Any, q: Any) -> float:
    """Of distributions q from p, over all positions."""
    each = [(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]
    return float(torch.cat(each).mean())


def right_answers(examples: Sequence[Example]) -> dict[str, float]:
    prompts: Any = [{"prompt": e.prompt, "multi_modal_data": {"image": list(e.pictures)}} for e in examples]
    shares: dict[str, float] = {}
    for title, stored in STORED.items():
        settings: Any = {"dtype": "bfloat16", **stored}
        with LLM("demo", media_workers=0, **settings) as llm:
            outputs = llm.generate(prompts, ANSWER, use_tqdm=False)
        right = [score(e, o.outputs[0].text)[0] for e, o in zip(examples, outputs, strict=True)]
        shares[title] = sum(right) / len(right)
    return shares


def products() -> dict[str, Times]:
    """Print and return what products of several widths take."""
    kernels = select(torch.device("cuda"))
    report: dict[str, Times] = {}
    print(f"{'':<28}{'bfloat16':>10}{'FP8':>10}{'quantise':>10}{'speed-up':>10}")
    for (name, (num_out, num_in)), rows in itertools.product(PRODUCTS.items(), ROWS):
        times = report[f"{name}, {rows} rows"] = times_of(kernels, num_out, num_in, rows)
        cells = "".join(f"{value:10.1f}" for value in times)
        print(f"{name + f', {rows} rows':<28}{cells}{times.bfloat16 / (times.fp8 + times.quantise):10.2f}", flush=True)
    return report


def times_of(kernels: Kernels, num_out: int, num_in: int, rows: int) -> Times:
    x = torch.randn(rows, num_in, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(num_out, num_in, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
    packed = [quantized.quantize_rows(weight) for weight in weights]
    q = kernels.quantize_rows(x)
    return Times(
        microseconds([partial(kernels.linear, x, weight, None) for weight in weights]),
        microseconds([partial(kernels.quantized_linear, q, w, s.squeeze(1), None, x.dtype) for w, s in packed]),
        microseconds([partial(kernels.quantize_rows, x)] * COPIES),
    )


def microseconds(works: Sequence[Callable[[], object]]) -> float:
    """Of each in turn, replayed from a graph so that launching costs nothing; the median of some."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for work in works:
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for work in works:
                work()
        times: list[float] = []
        for _ in range(9):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(works))
    return statistics.median(times)


if __name__ == "__main__":
    main()
