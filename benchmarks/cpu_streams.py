"""opsin against transformers.generate on one CPU, with one stream and with several: first token, each token, and where
opsin's time goes.

    python benchmarks/cpu_streams.py [--streams 8] [--repeats 5] [--dtype bfloat16] [--threads 2] [--int8]
        [--json FILE]

The model is a random Qwen2-VL of 0.6 B parameters (``shapes.SHAPES["qwen2vl-0.6b"]``), the request a 448x448 JPEG and a
short question, 284 tokens, with 33 tokens of answer. Clocks start at the encoded picture. Every picture is new, so no
cache helps. Sides take turns, and every figure is the least and the median over repeats: on a machine with other
work the least is what the engine can do, and the ratio is the median of each turn's.

Greedy ids are compared; in float32 they must be equal up to ties in transformers' own logits. ``--stages`` runs opsin
alone once more with a clock around every kernel, and says what a prompt and a decode step are made of. ``--int8`` adds
opsin with weights of 8 bits, whose ids are another model's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple
from unittest import mock

import shapes
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, StoppingCriteria
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from opsin import LLM, SamplingParams
from opsin.cli import environment
from opsin.cli.synthetic import photo
from opsin.engine.core import EngineCore
from opsin.kernels import Kernels, packed
from opsin.kernels.reference import one_by_one
from opsin.runner.runner import ModelRunner
from opsin.runner.vision import VisionStore
from opsin.types import StepPlan

SIDE = 448
NUM_TOKENS = 33
TIE_TOLERANCE = 1e-3  # of a logit; float32 sums in another order differ by about 1e-5
QUESTION = "Describe the main objects in this picture"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


class Request(NamedTuple):
    prompt: str
    jpeg: bytes


class Answers(NamedTuple):
    """What one turn took, in seconds.

    Attributes:
        first_s: from the start to the first token of the request that got it last.
        token_s: from each token to the next, once all requests have their first.
        total_s: until all are answered.
    """

    ids: list[list[int]]
    first_s: float
    token_s: float
    total_s: float


Side = Callable[[Sequence[Request]], Answers]


def build_checkpoint(folder: Path) -> Path:
    """Save the model with weights drawn so that logits spread and pictures matter."""
    folder = shapes.write_shape(folder, "qwen2vl-0.6b")
    config = Qwen2VLConfig.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.3 / parameter[0].numel() ** 0.5, generator=generator)
            elif not name.endswith("weight"):
                parameter.normal_(std=0.02, generator=generator)
    model.bfloat16().save_pretrained(folder)
    return folder


def make_requests(turn: int, count: int) -> list[Request]:
    """``count`` requests with pictures that no other turn has."""
    prompt = f"<|im_start|>user\n{PICTURE}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    return [Request(prompt, photo(SIDE, SIDE, seed=(turn, index))) for index in range(count)]


class Clock(StoppingCriteria):
    """Notes when each token of a batch was there; stops nothing."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # pyright: ignore
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Transformers:
    """``generate``, greedy, a fixed number of tokens, all requests as one batch."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._pictures: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self._image_id = self._tokenizer.convert_tokens_to_ids("<|image_pad|>")

    @torch.inference_mode()
    def __call__(self, requests: Sequence[Request]) -> Answers:
        clock = Clock()
        begun_s = time.perf_counter()
        inputs = self._inputs(requests)
        limits = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
        ids = self._model.generate(**inputs, **limits, do_sample=False, eos_token_id=None, stopping_criteria=[clock])
        ended_s = time.perf_counter()
        first_s, last_s = clock.times_s[0], clock.times_s[-1]
        generated = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return Answers(generated, first_s - begun_s, (last_s - first_s) / (NUM_TOKENS - 1), ended_s - begun_s)

    @torch.inference_mode()
    def logits_after(self, request: Request, continuation: Sequence[int]) -> torch.Tensor:
        """The next token's logits, (V,), after the prompt and these tokens."""
        inputs = self._inputs([request])
        more = torch.tensor([list(continuation)], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._image_id).int()
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return self._model(**inputs).logits[0, -1].float()

    def _inputs(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        images = [Image.open(io.BytesIO(request.jpeg)).convert("RGB") for request in requests]
        inputs = dict(self._pictures(images, return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
        texts = [
            r.prompt.replace("<|image_pad|>", "<|image_pad|>" * count)
            for r, count in zip(requests, counts, strict=True)
        ]
        inputs |= dict(self._tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._image_id).int()
        return inputs


def opsin_side(llm: LLM) -> Side:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)

    def answer(requests: Sequence[Request]) -> Answers:
        prompts: list[Any] = [{"prompt": r.prompt, "multi_modal_data": {"image": r.jpeg}} for r in requests]
        begun_s = time.perf_counter()
        begun_monotonic_s = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        ended_s = time.perf_counter()
        spans: list[tuple[float, float]] = []
        for output in outputs:
            assert output.metrics is not None
            assert output.metrics.first_token_time is not None
            assert output.metrics.last_token_time is not None
            spans.append((output.metrics.first_token_time, output.metrics.last_token_time))
        first_s, last_s = max(spans)  # the others may be done some steps earlier
        return Answers(
            [list(output.outputs[0].token_ids) for output in outputs],
            first_s - begun_monotonic_s,
            (last_s - first_s) / (NUM_TOKENS - 1),
            ended_s - begun_s,
        )

    return answer


def disagreements(
    ours: Answers, theirs: Answers, requests: Sequence[Request], oracle: Transformers
) -> tuple[int, list[str]]:
    """Compare answers; returns how many parted at a tie, and what is wrong with the others."""
    ties, wrong = 0, []
    for index, (our_ids, their_ids) in enumerate(zip(ours.ids, theirs.ids, strict=True)):
        at = next((i for i, pair in enumerate(zip(our_ids, their_ids, strict=True)) if pair[0] != pair[1]), None)
        if at is None:
            continue
        logits = oracle.logits_after(requests[index], their_ids[:at])
        gap = float(logits.max() - min(logits[our_ids[at]], logits[their_ids[at]]))
        if gap <= TIE_TOLERANCE:
            ties += 1
        else:
            wrong.append(f"request {index}, token {at}: {our_ids[at]}, transformers {their_ids[at]}, {gap:.2g} apart")
    return ties, wrong


class Stages:
    """Seconds by kind of step and stage; every kernel call is one entry of its stage.

    Args:
        now: the clock; the thread's own where one thread does all, which other work on the machine does not advance.
    """

    _STAGE_OF: ClassVar[dict[str, str]] = {
        "linear": "linears",
        "int8_linear": "linears",
        "paged_attention": "attention",
        "varlen_attention": "attention",
        "greedy": "sampler",
    }

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.kind = "prompt"
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        begun_s = self.now()
        yield
        self.seconds[self.kind, stage].append(self.now() - begun_s)

    def timed(self, kernels: Kernels, vocab_size: int) -> Kernels:
        """The same kernels, with a clock around each."""

        def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                stage = self._STAGE_OF.get(name, "norms, rope, cache writes, activations")
                if name == "linear" and args[1].shape[0] == vocab_size:
                    stage = "lm head"
                begun_s = self.now()
                result = function(*args, **kwargs)
                self.seconds[self.kind, stage].append(self.now() - begun_s)
                return result

            return call

        functions = {
            field.name: around(field.name, getattr(kernels, field.name))
            for field in dataclasses.fields(kernels)
            if field.name not in ("replayable", "pack_linear")
        }
        # On a CPU the one is made of the others, which belong to different stages.
        parts = functions["rms_norm"], functions["linear"], functions["gated_activation"]
        functions["normed_linear"] = one_by_one(*parts)
        return dataclasses.replace(kernels, **functions)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Clocks around every engine made inside."""
        launch, encode, step = ModelRunner.launch, VisionStore.encode, EngineCore.step

        def timed_launch(runner: ModelRunner, plan: StepPlan) -> Any:
            is_decode = all(row.num_tokens == 1 for row in plan.rows) and not plan.encode
            self.kind = "decode" if is_decode and plan.rows else "prompt"
            begun_s, already_s = self.now(), sum(self.seconds["tower", "launch"])
            pending = launch(runner, plan)
            encoding_s = sum(self.seconds["tower", "launch"]) - already_s
            self.seconds[self.kind, "launch"].append(self.now() - begun_s - encoding_s)
            return pending

        def timed_encode(store: VisionStore, items: Any) -> None:
            self.kind = "tower"
            with self.clock("launch"):
                encode(store, items)
            self.kind = "prompt"

        def timed_step(core: EngineCore) -> Any:
            self.kind = "idle"
            begun_s = self.now()
            updates = step(core)
            self.seconds[self.kind, "engine step"].append(self.now() - begun_s)
            return updates

        with (
            mock.patch.object(
                packed, "KERNELS", self.timed(packed.KERNELS, shapes.SHAPES["qwen2vl-0.6b"]["vocab_size"])
            ),
            mock.patch.object(ModelRunner, "launch", timed_launch),
            mock.patch.object(VisionStore, "encode", timed_encode),
            mock.patch.object(EngineCore, "step", timed_step),
        ):
            yield

    def table(self) -> dict[str, dict[str, float]]:
        """Milliseconds per pass by stage: medians over passes of what each pass spent there."""
        table: dict[str, dict[str, float]] = {}
        for kind in ("tower", "prompt", "decode"):
            passes = len(self.seconds[kind, "launch"])
            if not passes:
                continue
            whole = statistics.median(self.seconds[kind, "launch"])
            stages = {
                stage: _per_pass(seconds, passes)
                for (of, stage), seconds in self.seconds.items()
                if of == kind and stage not in ("launch", "engine step")
            }
            stages["torch glue, input building, Python"] = whole - sum(stages.values())
            if kind == "decode":
                step = statistics.median(self.seconds[kind, "engine step"])
                stages["plan and commit"] = step - whole
                whole = step
            table[kind] = {stage: round(1e3 * seconds, 2) for stage, seconds in stages.items()} | {
                "whole": round(1e3 * whole, 2)
            }
        return table


def _per_pass(seconds: list[float], passes: int) -> float:
    size = len(seconds) // passes
    return statistics.median(sum(seconds[i : i + size]) for i in range(0, size * passes, size))


def engine(folder: Path, args: argparse.Namespace, quantization: Literal["int8"] | None = None) -> LLM:
    return LLM(
        model=str(folder),
        dtype=args.dtype,
        quantization=quantization,
        max_model_len=1024,
        max_num_seqs=args.streams,
        max_num_batched_tokens=1024,
        max_num_batched_patches=1024 * min(4, args.streams),
        num_threads=args.threads,
        seed=0,
    )


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides in turns: seconds by scene and side, ties, disagreements."""
    oracle = Transformers(folder, getattr(torch, args.dtype))
    turns: dict[str, list[dict[str, float]]] = defaultdict(list)
    ties, wrong = 0, []
    with contextlib.ExitStack() as engines:
        sides: dict[str, Side] = {"opsin": opsin_side(engines.enter_context(engine(folder, args)))}
        if args.int8:
            sides["opsin int8"] = opsin_side(engines.enter_context(engine(folder, args, "int8")))
        sides["transformers"] = oracle
        for side in sides.values():
            side(make_requests(args.repeats, 2))
        for turn in range(args.repeats):
            for count in sorted({1, args.streams}):
                requests = make_requests(turn * 100 + count, count)
                answers = {name: side(requests) for name, side in sides.items()}
                for name, answer in answers.items():
                    figures = {"first_s": answer.first_s, "token_s": answer.token_s, "total_s": answer.total_s}
                    turns[f"{name}, {count}"].append({key: round(value, 5) for key, value in figures.items()})
                    print(f"turn {turn}, {name}, {count} streams: {turns[f'{name}, {count}'][-1]}", file=sys.stderr)
                more_ties, more_wrong = disagreements(answers["opsin"], answers["transformers"], requests, oracle)
                ties += more_ties
                wrong += [f"turn {turn}, {count} streams, {line}" for line in more_wrong]
    return {"turns": dict(turns), "ties": ties, "disagreements": wrong}


def staged(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """opsin alone, under clocks."""
    tables: dict[str, Any] = {}
    watch = Stages(time.thread_time if args.threads == 1 else time.perf_counter)
    with watch.watching(), engine(folder, args, "int8" if args.int8 else None) as llm:
        side = opsin_side(llm)
        for count in sorted({1, args.streams}):
            side(make_requests(7000, count))
            watch.seconds.clear()
            for turn in range(args.repeats):
                side(make_requests(7100 + 100 * count + turn, count))
            tables[str(count)] = watch.table()
    return tables


def _summary(turns: dict[str, list[dict[str, float]]], streams: int) -> list[str]:
    lines = [
        f"{'':<18}{'first token, s':>18}{'token, ms':>18}{'tokens/s':>18}{'whole, s':>18}",
        " " * 18 + "   least / median" * 4,
    ]
    for name, rows in turns.items():
        count = int(name.rpartition(" ")[2])
        cells = [_pair([row["first_s"] for row in rows], 1, 2), _pair([row["token_s"] for row in rows], 1e3, 1)]
        rates = [count / row["token_s"] for row in rows]
        cells += [f"{max(rates):.1f} / {statistics.median(rates):.1f}", _pair([row["total_s"] for row in rows], 1, 2)]
        lines.append(f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells))
    others = {name.rpartition(",")[0] for name in turns} - {"opsin"}
    for other, count in itertools.product(sorted(others), sorted({1, streams})):
        ratios = [
            statistics.median(
                t[key] / o[key] for o, t in zip(turns[f"opsin, {count}"], turns[f"{other}, {count}"], strict=True)
            )
            for key in ("first_s", "token_s", "total_s")
        ]
        lines.append(f"{other} / opsin, {count}: " + "first {:.2f}, token {:.2f}, whole {:.2f}".format(*ratios))
    if streams > 1:
        gain = (
            streams
            * min(r["token_s"] for r in turns["opsin, 1"])
            / min(r["token_s"] for r in turns[f"opsin, {streams}"])
        )
        lines.append(f"opsin decodes {gain:.2f} times as many tokens a second with {streams} streams as with one")
    return lines


def _pair(values: list[float], factor: float, digits: int) -> str:
    return f"{min(values) * factor:.{digits}f} / {statistics.median(values) * factor:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="where to keep the model; made there if absent")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--streams", type=int, default=8, help="requests at once (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of both sides (default: 2)")
    parser.add_argument("--int8", action="store_true", help="also run opsin with weights of 8 bits")
    parser.add_argument("--stages", action="store_true", help="also say what opsin's steps are made of")
    parser.add_argument("--stages-only", action="store_true", help="leave transformers out")
    parser.add_argument("--json", metavar="FILE", help="also write the report here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        parent = args.checkpoint or Path(temporary)
        folder = parent / "qwen2vl-0.6b"
        if not (folder / "model.safetensors").exists():
            build_checkpoint(parent)
        report: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]),
            "dtype": args.dtype,
            "streams": args.streams,
            "environment": environment.collect(),
        }
        if not args.stages_only:
            report |= measured(args, folder)
        if args.stages or args.stages_only:
            report["stages_ms"] = staged(args, folder)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    facts = report["environment"]
    print(f"commit {facts['commit']}, {facts['cpu']}, {args.threads} threads, {args.dtype}")
    if "turns" in report:
        print("\n".join(_summary(report["turns"], args.streams)))
        print(f"{len(report['disagreements'])} answers differ, {report['ties']} part at a tie")
    for count, table in report.get("stages_ms", {}).items():
        for kind, stages in table.items():
            print(f"{count} streams, {kind}: " + "; ".join(f"{stage} {ms:.2f}" for stage, ms in stages.items()) + " ms")
    if args.dtype == "float32" and report.get("disagreements"):
        print(
            "FAILED: greedy ids differ from transformers':\n  " + "\n  ".join(report["disagreements"]), file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
