"""What the engine's own thread spends on a step, beside a device whose work is nothing.

    python benchmarks/host_step.py [--rows 1,32,128,256] [--mixed] [--sampled] [--first] [--profile LINES] [--json FILE]

The real engine core, scheduler and runner around a model that computes nothing: requests with M-RoPE prompts of 700
tokens, a picture among them, that answer one token a step. Timed are planning, launching (a step's inputs, their upload
and what torch is called for), waiting for what was drawn, taking it in, and the message to the front. With ``--mixed``
requests come and go all the time; with ``--sampled`` tokens are drawn rather than the likeliest taken; with ``--first``
only those steps count that read a prompt whose picture has just come, one request after the other. Of each stage the
tenth percentile is shown, which what else runs on the machine disturbs least, and of the whole the median and the 99th.
On a CPU the decoder's graphs are replaced by nothing at all; on CUDA, they are real ones, of a few kernels.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from opsin.cli import environment
from opsin.engine.core import EngineCore
from opsin.engine.messages import News
from opsin.kernels import reference, select
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.params import SamplingParams
from opsin.runner.executor import Embedding, MemoryPlan
from opsin.runner.graphs import StepGraphs
from opsin.runner.inline import InlineExecutor
from opsin.runner.kept import Graph
from opsin.runner.launched import LaunchedStep
from opsin.runner.runner import ModelRunner
from opsin.scheduler import Scheduler, SchedulerLimits
from opsin.types import EngineRequest, FeatureSpan, MediaItem, MediaLayout, ModelSpec, PixelPlan, StepPlan

_PROMPT, _ANSWER, _PICTURE, _BLOCK = 700, 64, 400, 16
_AXES, _WIDTH, _VOCAB = 3, 8, 32
_STAGES = ("plan", "launch", "wait", "commit", "core", "message")


class NoModel:
    """A ``VisionLanguageModel`` that computes nothing."""

    spec = ModelSpec(
        architecture="None",
        vocab_size=_VOCAB,
        hidden_size=_WIDTH,
        feature_width=_WIDTH,
        max_position=8192,
        layers=(),
        num_position_axes=_AXES,
    )

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return iter(())

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        return torch.zeros(sum(layout.num_features for layout in layouts), _WIDTH, device=self._device)

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(ids_T), _WIDTH, device=self._device)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        positions_AT: torch.Tensor,
        attention: AttentionInputs,
        caches: Sequence[LayerCache],
        extra_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return hidden_TD

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden_BD), _VOCAB, device=self._device)

    def ranking(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden_BD)


class _Nothing:
    def replay(self) -> None: ...


def record_nothing(work: Callable[[], torch.Tensor], *, warm_up: bool) -> tuple[Graph, torch.Tensor]:
    """A ``Record`` whose graphs do nothing."""
    return _Nothing(), work()


class Clock:
    """Seconds by stage of the step that is under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begun_s = time.thread_time()
            try:
                return call(*args)
            finally:
                self.seconds[stage] += time.thread_time() - begun_s

        return timed


def make_core(num_rows: int, device: torch.device, clock: Clock) -> EngineCore:
    """An engine for ``num_rows`` requests at once, on the clock."""
    limits = SchedulerLimits(
        max_num_seqs=num_rows,
        max_num_batched_tokens=8192,
        max_num_batched_patches=16384,
        max_model_len=2048,
        num_blocks=2 * num_rows * (_PROMPT + _ANSWER) // _BLOCK + 64,
        block_size=_BLOCK,
        feature_bytes=2**28,
        feature_row_bytes=4 * _WIDTH,
        pixel_bytes=2**30,
        pipeline_depth=2,
    )
    kernels = replace(select(device), greedy=reference.greedy)
    runner = ModelRunner(
        NoModel(device),
        max_num_seqs=num_rows,
        max_model_len=limits.max_model_len,
        block_size=_BLOCK,
        device=device,
        dtype=torch.float32,
        kernels=kernels,
    )
    memory = MemoryPlan(0, 0, 0, 0, 0, limits.num_blocks, _BLOCK)
    executor = InlineExecutor(runner, memory, graphs_of=(limits.max_num_batched_tokens, limits.max_num_batched_patches))
    if device.type == "cpu":
        graphs = StepGraphs(
            runner.model,
            [],
            runner._slots,
            block_size=_BLOCK,
            max_rows=num_rows,
            max_tokens=limits.max_num_batched_tokens,
            dtype=torch.float32,
            record=record_nothing,
        )
        graphs.capture_first()
        runner._graphs = graphs
    scheduler = Scheduler(limits)
    scheduler.plan = clock.timed("plan", scheduler.plan)
    scheduler.commit = clock.timed("commit", scheduler.commit)

    def launch(plan: StepPlan) -> LaunchedStep:
        pending = runner.launch(plan)
        pending.result = clock.timed("wait", pending.result)
        return pending

    executor.launch = clock.timed("launch", launch)
    return EngineCore(scheduler, executor, pipeline_depth=limits.pipeline_depth)


def make_request(number: int, params: SamplingParams) -> EngineRequest:
    """A prompt with a picture that no other has."""
    rng = np.random.default_rng(number)
    positions = np.tile(np.arange(_PROMPT, dtype=np.int32), (_AXES, 1))
    positions[1:, 20 : 20 + _PICTURE] //= 2
    layout = MediaLayout(PixelPlan(448, 448, ()), num_features=_PICTURE, num_patches=4 * _PICTURE)
    return EngineRequest(
        request_id=f"request-{number}",
        prompt_token_ids=rng.integers(2, _VOCAB, _PROMPT).tolist(),
        params=params,
        media=[MediaItem(number.to_bytes(16, "little"), "image", layout)],
        spans=[FeatureSpan(0, 20, _PICTURE)],
        positions=positions.tobytes(),
        position_delta=-_PICTURE // 2,
        stop_token_ids=frozenset({_VOCAB}),
        seed=number,
    )


def steps_of(num_rows: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """Milliseconds by stage of each step that counts."""
    clock = Clock()
    core = make_core(num_rows, args.device, clock)
    params = SamplingParams(temperature=0.7 if args.sampled else 0.0, top_p=0.9, max_tokens=_ANSWER)
    features = Embedding(np.zeros((_PICTURE, _WIDTH), dtype=np.float32))
    encode = msgspec.msgpack.Encoder().encode
    made = alive = 0
    steps: list[dict[str, float]] = []

    def step(*, refill: bool) -> bool:
        nonlocal made, alive
        # Mixed, they come one every few steps, as their answers' length has it; else all at once.
        while refill and alive < num_rows:
            core.add(make_request(made, replace_tokens(params, made) if args.mixed else params))
            made += 1
            alive += 1
        for need in core.take_needs():
            core.put_payload(need.key, features)
        clock.seconds.clear()
        begun_s = time.thread_time()
        updates = core.step()
        ended_s = time.thread_time()
        if updates:
            encode(News(updates))
        clock.seconds["core"] = ended_s - begun_s - sum(clock.seconds.values())
        clock.seconds["message"] = time.thread_time() - ended_s
        alive -= sum([update.finish_reason is not None for update in updates])
        return len(updates) == num_rows

    profile = cProfile.Profile() if args.profile else None
    for number in range(40 * args.runs if args.first else 0):
        core.add(make_request(number, params))
        needs = core.take_needs()
        core.step()  # while the picture is decoded
        for need in needs:
            core.put_payload(need.key, features)
        step(refill=False)
        steps.append({stage: 1e3 * clock.seconds[stage] for stage in _STAGES})
        while core.has_work:
            core.step()
    for _ in range(0 if args.first else args.runs):
        while not step(refill=True) and not args.mixed:  # until all have begun
            pass
        for _ in range(2 * _ANSWER if args.mixed else 0):
            step(refill=True)
        for _ in range(_ANSWER - 24):
            if profile is not None:
                profile.enable()
            step(refill=args.mixed)
            if profile is not None:
                profile.disable()
            steps.append({stage: 1e3 * clock.seconds[stage] for stage in _STAGES})
        while core.has_work and not args.mixed:
            step(refill=False)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(args.profile)
    return steps


def low(values: Sequence[float]) -> float:
    """The tenth percentile, which what else runs on the machine disturbs least."""
    return sorted(values)[len(values) // 10]


def replace_tokens(params: SamplingParams, number: int) -> SamplingParams:
    """Answers of many lengths."""
    return msgspec.structs.replace(params, max_tokens=_ANSWER // 2 + 37 * number % _ANSWER)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 32, 128, 256])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "rows": {}}
    names = [*_STAGES, "total", "p50", "p99"]
    print("rows" + "".join(f"{name:>9}" for name in names) + "  (ms of the thread's own time)")
    for num_rows in args.rows:
        steps = steps_of(num_rows, args)
        totals = sorted(sum(step.values()) for step in steps)
        row = {stage: low([step[stage] for step in steps]) for stage in _STAGES}
        row |= {"total": low(totals), "p50": statistics.median(totals), "p99": totals[int(0.99 * len(totals))]}
        report["rows"][num_rows] = {name: round(value, 4) for name, value in row.items()}
        print(f"{num_rows:>4}" + "".join(f"{value:>9.3f}" for value in row.values()), flush=True)
        gc.collect()
    if args.json:
        report["environment"] = environment.collect()
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
