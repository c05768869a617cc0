"""One engine in a process of its own: prints a JSON line for each workload as it is done. ``offline.py`` starts it.

The peer's process imports nothing of opsin, and may run beside other versions of everything.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from workloads import STREAMED, WORKLOADS, Request, requests_of

_NUM_PROFILED = 64
_NUM_UNCOUNTED = 2  # of w2


@dataclass(frozen=True)
class Task:
    """What a worker is to do.

    Attributes:
        engine: "opsin", "vllm", or "vllm-tuned", with HF's picture processor on the GPU.
        settings: further keywords of the engine's ``LLM``.
        profile: where opsin's breakdowns and traces go, of one more run of each workload.
    """

    engine: str
    shape: str
    models: str
    pictures: str
    workloads: list[str]
    settings: dict[str, Any]
    profile: str | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class Engine(Protocol):
    """Every call begins with encoded bytes and returns when all is answered."""

    def ask(self, requests: Sequence[Request], tokens: int) -> list[int]:
        """Answer all at once, with so many tokens each (0: a vector each); the numbers of prompt tokens."""
        ...

    def stream(self, request: Request, tokens: int) -> list[float]:
        """Answer one; when each token came, by ``time.perf_counter``."""
        ...


class OpsinEngine:
    def __init__(self, task: Task) -> None:
        from opsin import LLM

        settings: Any = {"load_format": "dummy", "max_model_len": 8192, **task.settings}
        self._llm = LLM(f"{task.models}/{task.shape}", **settings)

    def ask(self, requests: Sequence[Request], tokens: int) -> list[int]:
        prompts: Any = [_prompt(*request) for request in requests]
        if not tokens:
            return [len(output.prompt_token_ids) for output in self._llm.embed(prompts, use_tqdm=False)]
        outputs = self._llm.generate(prompts, self._params(tokens), use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return [len(output.prompt_token_ids) for output in outputs]

    def stream(self, request: Request, tokens: int) -> list[float]:
        front = self._llm._front
        front.submit("streamed", front.read_prompt(_prompt(*request)), self._params(tokens), kind="delta")
        times: list[float] = []
        while front.num_unfinished:
            batch = front.step()
            times += [time.perf_counter() for output in batch.outputs for _ in output.outputs[0].token_ids]
        front.come_to_rest()
        return times

    def _params(self, tokens: int) -> Any:
        from opsin import SamplingParams

        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


class VllmEngine:
    """Decodes in 16 threads, since vLLM takes pictures."""

    def __init__(self, task: Task) -> None:
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        settings = {"load_format": "dummy", **task.settings}
        if task.engine == "vllm-tuned":
            settings["mm_processor_kwargs"] = {"device": "cuda"}
        if "embed" in task.workloads:
            assert task.workloads == ["embed"], "vLLM makes vectors or text, not both"
            settings |= {"runner": "pooling", "convert": "embed"}
        self._llm = LLM(model=f"{task.models}/{task.shape}", **settings)
        self._threads = ThreadPoolExecutor(16)
        self._num_streamed = 0

    def ask(self, requests: Sequence[Request], tokens: int) -> list[int]:
        unique = {id(jpeg): jpeg for _, jpeg in requests}
        decoded = dict(zip(unique, self._threads.map(_decoded, unique.values()), strict=True))
        prompts = [_prompt(text, decoded[id(jpeg)]) for text, jpeg in requests]
        if not tokens:
            return [len(output.prompt_token_ids) for output in self._llm.embed(prompts, use_tqdm=False)]
        outputs = self._llm.generate(prompts, self._params(tokens), use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return [len(output.prompt_token_ids) for output in outputs]

    def stream(self, request: Request, tokens: int) -> list[float]:
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        params = self._params(tokens)
        params.output_kind = RequestOutputKind.DELTA
        engine = self._llm.llm_engine
        text, jpeg = request
        self._num_streamed += 1
        prepared = self._llm._preprocess_cmpl_one(_prompt(text, _decoded(jpeg)))
        engine.add_request(f"streamed-{self._num_streamed}", prepared, params)
        times: list[float] = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            times += [time.perf_counter() for output in outputs for _ in output.outputs[0].token_ids]
        return times

    def _params(self, tokens: int) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def _prompt(text: str, image: Any) -> Any:
    return {"prompt": text, "multi_modal_data": {"image": image}}


def _decoded(jpeg: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def work(task: Task) -> None:
    """Start the engine, and measure."""
    engine: Engine = OpsinEngine(task) if task.engine == "opsin" else VllmEngine(task)
    folder, shape = Path(task.pictures), task.shape
    warm = requests_of(folder, shape, "warm")
    makes_vectors = task.workloads == ["embed"]
    engine.ask(warm[:1], 0 if makes_vectors else 2)
    report(ready_s=round(_age_s(), 1))
    engine.ask(warm, 0 if makes_vectors else 16)
    for name, workload in WORKLOADS.items():
        if name not in task.workloads:
            continue
        rates: list[float] = []
        lengths = [0]
        for run in range(workload.num_runs):
            requests = requests_of(folder, shape, f"{name}{run}", workload.num_asked)
            begun_s = time.perf_counter()
            lengths = engine.ask(requests, workload.tokens)
            rates.append(round(len(requests) / (time.perf_counter() - begun_s), 2))
        report(**{name: rates, f"{name}_prompt_tokens": round(sum(lengths) / len(lengths), 1)})
    if "w2" in task.workloads:
        rows = [_streamed(engine, request) for request in requests_of(folder, shape, "w20")][_NUM_UNCOUNTED:]
        first_s, token_s = (statistics.median(row[i] for row in rows) for i in (0, 1))
        report(w2_first_ms=round(1e3 * first_s, 2), w2_token_ms=round(1e3 * token_s, 3))
    if task.profile is not None:
        _profile(task, engine, Path(task.profile))


def _streamed(engine: Engine, request: Request) -> tuple[float, float]:
    """Seconds to the first token, and per token after it."""
    begun_s = time.perf_counter()
    times = engine.stream(request, STREAMED.tokens)
    assert len(times) == STREAMED.tokens, len(times)
    return times[0] - begun_s, (times[-1] - times[0]) / (len(times) - 1)


def report(**values: Any) -> None:
    """Tell whoever started this process, at once."""
    print(json.dumps(values), flush=True)


def _age_s() -> float:
    """Seconds since this process was started; imports are part of them."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------- where the time goes


def _profile(task: Task, engine: Engine, folder: Path) -> None:
    """A breakdown and a trace of each workload on further pictures, and the device's time by kind of kernel in w1."""
    from opsin.cli import tracing

    folder.mkdir(parents=True, exist_ok=True)
    pictures = Path(task.pictures)
    for name in task.workloads:
        workload = STREAMED if name == "w2" else WORKLOADS[name]
        requests = requests_of(pictures, task.shape, f"{name}{workload.num_runs}", workload.num_asked)[:_NUM_PROFILED]
        with tracing.watching() as recorder:
            if name == "w2":
                for request in requests:
                    engine.stream(request, STREAMED.tokens)
            else:
                engine.ask(requests, workload.tokens)
        summary = tracing.breakdown(recorder)
        (folder / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (folder / f"{name}.txt").write_text(tracing.render(summary) + "\n", encoding="utf-8")
        recorder.write(folder / f"{name}.trace.json")
        report(**{f"{name}_profile": str(folder / f"{name}.txt")})
    if "w1" in task.workloads:
        requests = requests_of(pictures, task.shape, f"w1{WORKLOADS['w1'].num_runs + 1}")[:_NUM_PROFILED]
        report(w1_kernels_ms=_kernels(lambda: engine.ask(requests, WORKLOADS["w1"].tokens)))


_KERNELS = (  # of the device, by what their names contain; the first that fits
    ("tower attention", ("_varlen", "fmha", "flash")),
    ("decoder attention", ("_attention_kernel", "_join_kernel")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "_row_kernel", "splitK", "gemv")),
    ("norms", ("norm",)),
    ("activations and gates", ("_activation_kernel", "_gate_kernel", "_quantize_kernel")),
    ("rotation and cache writes", ("_rope", "_write_kv")),
    ("copies to and from the host", ("Memcpy HtoD", "Memcpy DtoH")),
)


def _kernels(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the device by kind of kernel, the longest first, with the wall time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    begun_s = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
    wall_s = time.perf_counter() - begun_s
    groups: dict[str, float] = {}
    for entry in profiler.key_averages():
        spent_us = entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
        fitting = (name for name, parts in _KERNELS if any(part in entry.key for part in parts))
        name = next(fitting, "other")
        groups[name] = groups.get(name, 0.0) + spent_us / 1e3
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    return {"wall": round(1e3 * wall_s, 1)} | {name: round(spent, 1) for name, spent in ordered}


if __name__ == "__main__":
    work(Task(**json.loads(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # engines' own processes are not waited for
