"""W1, W2, W3 and W5 offline: opsin and, where it is installed, vLLM, on the same pictures in one call.

    python benchmarks/offline.py [--shape qwen2vl-2b] [--engines opsin,vllm] [--json FILE]

* W1: ``--n`` requests with one picture each, of mixed sizes, 64 tokens out;
* W2: one request at a time, 640x480, 128 tokens out: time to the first token, and per token after it;
* W3: ``--n`` requests with a picture of 1024x768 each, one token out;
* W5: ``--n`` / 4 pictures of mixed sizes, each asked four times, 64 tokens out.

Every clock starts at encoded bytes, for every engine. Each engine has a process of its own, random weights, and is
warmed up first. W1 and W3 run twice on different pictures; the better run counts. vLLM decodes in 16 threads inside the
clock, and runs as its defaults have it ("vllm") and with its processor on the GPU ("vllm-tuned").
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import shapes

Ask = Callable[[Sequence[tuple[str, bytes]], int], list[int]]
"""Answers (prompt, JPEG) pairs with so many tokens each; returns the numbers of prompt tokens."""
Stream = Callable[[str, bytes, int], list[float]]
"""Answers one; returns the time of every token."""


def main() -> None:
    args = _arguments()
    if args.worker:
        _work(args)
        return
    import pictures

    with tempfile.TemporaryDirectory() as scratch:
        models = args.models or Path(scratch) / "models"
        images = args.pictures or Path(scratch) / "pictures"
        shapes.write_shape(models, args.shape, tiny=args.tiny)
        wanted = args.workloads.split(",")
        pictures.make(images, "warm", min(48, args.n), pictures.MIXED)
        for tag, count, sizes in _picture_sets(args.n):
            if tag[:2] in wanted:
                pictures.make(images, tag, count, sizes)
        if args.profile:
            pictures.make(images, "profile", min(48, args.n), pictures.MIXED)
        reports: dict[str, Any] = {}
        for engine in args.engines.split(","):
            reports[engine] = _run_worker(args, engine, models, images)
    from opsin.cli import environment

    report = {
        "command": shlex.join(["python", *sys.argv]),
        "shape": args.shape,
        "n": args.n,
        "engines": reports,
        "environment": environment.collect(),
    }
    print(_table(reports))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="qwen2vl-2b")
    parser.add_argument("--engines", default="opsin", help="of opsin, vllm, vllm-tuned; comma-separated")
    parser.add_argument("--workloads", default="w1,w3,w5,w2")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--models", type=Path, help="where model folders are written; a temporary one by default")
    parser.add_argument("--pictures", type=Path, help="where pictures are kept; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--settings", default="{}", help="more settings of opsin's engine, as JSON")
    parser.add_argument("--vllm-path", help="PYTHONPATH of vLLM's processes, where it is not installed beside opsin")
    parser.add_argument("--timeout", type=float, default=400, help="seconds an engine may take in all")
    parser.add_argument("--profile", type=Path, help="profile one more W1 of opsin's; write a Chrome trace here")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for a dry run on a CPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _picture_sets(n: int) -> list[tuple[str, int, tuple[tuple[int, int], ...]]]:
    from pictures import MIXED, VGA, XGA

    return [
        ("w1a", n, MIXED),
        ("w1b", n, MIXED),
        ("w3a", n, XGA),
        ("w3b", n, XGA),
        ("w5", n // 4, MIXED),
        ("w2", 12, VGA),
    ]


def _run_worker(args: argparse.Namespace, engine: str, models: Path, images: Path) -> dict[str, Any]:
    """The worker's JSON lines as one report; what it printed on the way goes to standard error."""
    command = [sys.executable, __file__, "--worker", engine, "--shape", args.shape, "--workloads", args.workloads]
    command += ["--n", str(args.n), "--models", str(models), "--pictures", str(images), "--settings", args.settings]
    if args.profile and engine == "opsin":
        command += ["--profile", str(args.profile)]
    environment = dict(os.environ)
    if engine.startswith("vllm"):
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        if args.vllm_path:
            environment["PYTHONPATH"] = args.vllm_path
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=args.timeout, check=False
        )
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, status = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or "", -1
    report: dict[str, Any] = {"exit_status": status}
    for line in output.splitlines():
        if line.startswith("{"):
            report |= json.loads(line)
    return report


def _work(args: argparse.Namespace) -> None:
    started = time.time()
    model, name = str(args.models / args.shape), args.shape
    # This parent's clock began before the imports.
    started -= time.clock_gettime(time.CLOCK_BOOTTIME) - _born()
    ask, stream = (_opsin if args.worker == "opsin" else _vllm)(args, model)
    asked = _load(args, "warm")
    ask([(shapes.prompt(name, 100 + i), jpeg) for i, jpeg in enumerate(asked[:1])], 2)
    _say(ready_s=round(time.time() - started, 1))
    ask([(shapes.prompt(name, 200 + i), jpeg) for i, jpeg in enumerate(asked)], 16)
    wanted = args.workloads.split(",")
    for workload, tags, tokens in (("w1", ("w1a", "w1b"), 64), ("w3", ("w3a", "w3b"), 1), ("w5", ("w5",), 64)):
        if workload not in wanted:
            continue
        rates: list[float] = []
        mean_prompt = 0.0
        for tag in tags:
            jpegs = _load(args, tag)
            if workload == "w5":
                jpegs = [jpeg for jpeg in jpegs for _ in range(4)]
            requests = [(shapes.prompt(name, i), jpeg) for i, jpeg in enumerate(jpegs)]
            begin = time.perf_counter()
            lengths = ask(requests, tokens)
            rates.append(round(len(requests) / (time.perf_counter() - begin), 2))
            mean_prompt = sum(lengths) / len(lengths)
        _say(**{f"{workload}_req_s": rates, f"{workload}_prompt_tokens": round(mean_prompt, 1)})
    if "w2" in wanted:
        rows: list[tuple[float, float]] = []
        for i, jpeg in enumerate(_load(args, "w2")):
            begin = time.perf_counter()
            times = stream(shapes.prompt(name, 7000 + i), jpeg, 128)
            rows.append((times[0] - begin, (times[-1] - times[0]) / (len(times) - 1)))
        ttft, tpot = (statistics.median(row[i] for row in rows[2:]) * 1e3 for i in (0, 1))
        _say(w2_ttft_ms=round(ttft, 2), w2_tpot_ms=round(tpot, 3))
    if args.profile:
        jpegs = _load(args, "profile")
        _profile(args.profile, lambda: ask([(shapes.prompt(name, 9000 + i), jpeg) for i, jpeg in enumerate(jpegs)], 64))
    sys.stdout.flush()
    os._exit(0)  # engines' own processes are not waited for


_GROUPS = (  # of device kernels, by what their names contain; the first that fits
    ("tower attention", ("_varlen_kernel", "fmha", "flash")),
    ("decoder attention", ("_attention_kernel", "_join_kernel")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "_row_kernel", "splitK", "gemv")),
    ("norms", ("norm",)),
    ("activations and gates", ("_activation_kernel", "_gate_kernel")),
    ("rotation and cache writes", ("_rope", "_write_kv")),
    ("copies to and from the host", ("Memcpy HtoD", "Memcpy DtoH")),
)


def _profile(path: Path, run: Callable[[], object]) -> None:
    """Milliseconds of the device by kind of work, and how long it was idle; the trace goes to ``path``."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
    wall = (time.perf_counter() - begin) * 1e3
    groups: dict[str, float] = {}
    for entry in profiler.key_averages():
        spent = (entry.self_device_time_total if on_gpu else entry.self_cpu_time_total) / 1e3
        fitting = (name for name, parts in _GROUPS if any(part in entry.key for part in parts))
        group = next(fitting, "other")
        groups[group] = groups.get(group, 0.0) + spent
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    _say(
        profile_wall_ms=round(wall),
        profile_busy_ms=round(sum(groups.values())),
        **{f"profile {name}, ms": round(spent, 1) for name, spent in ordered},
    )
    profiler.export_chrome_trace(str(path))


def _born() -> float:
    """When this process was started, in seconds since the machine was."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def _load(args: argparse.Namespace, tag: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(args.pictures.glob(f"{tag}_*.jpg"))][: args.n]


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _opsin(args: argparse.Namespace, model: str) -> tuple[Ask, Stream]:
    from opsin import LLM, SamplingParams

    settings: Any = {"load_format": "dummy", "max_model_len": 8192, **json.loads(args.settings)}
    llm = LLM(model, **settings)

    def ask(requests: Sequence[tuple[str, bytes]], tokens: int) -> list[int]:
        prompts: Any = [{"prompt": text, "multi_modal_data": {"image": jpeg}} for text, jpeg in requests]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return [len(output.prompt_token_ids) for output in outputs]

    def stream(text: str, jpeg: bytes, tokens: int) -> list[float]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        front = llm._front
        front.submit(
            text, front.read_prompt({"prompt": text, "multi_modal_data": {"image": jpeg}}), params, kind="delta"
        )
        times: list[float] = []
        while front.num_unfinished:
            batch = front.step()
            times += [time.perf_counter() for output in batch.outputs for _ in output.outputs[0].token_ids]
        front.come_to_rest()
        return times

    return ask, stream


def _vllm(args: argparse.Namespace, model: str) -> tuple[Ask, Stream]:
    from PIL import Image
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

    extra: dict[str, Any] = {"mm_processor_kwargs": {"device": "cuda"}} if args.worker == "vllm-tuned" else {}
    llm = LLM(model=model, load_format="dummy", **extra)
    threads = ThreadPoolExecutor(16)

    def decode(jpeg: bytes) -> Any:
        return Image.open(io.BytesIO(jpeg)).convert("RGB")

    def ask(requests: Sequence[tuple[str, bytes]], tokens: int) -> list[int]:
        unique = {id(jpeg): jpeg for _, jpeg in requests}
        decoded = dict(zip(unique, threads.map(decode, unique.values()), strict=True))
        prompts = [{"prompt": text, "multi_modal_data": {"image": decoded[id(jpeg)]}} for text, jpeg in requests]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return [len(output.prompt_token_ids) for output in outputs]

    def stream(text: str, jpeg: bytes, tokens: int) -> list[float]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        request = {"prompt": text, "multi_modal_data": {"image": decode(jpeg)}}
        engine = llm.llm_engine
        engine.add_request(text, llm._preprocess_cmpl_one(request), params)
        times: list[float] = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            times += [time.perf_counter() for output in outputs for _ in output.outputs[0].token_ids]
        return times

    return ask, stream


def _table(reports: dict[str, Any]) -> str:
    names = [name for name in next(iter(reports.values())) if name != "exit_status"] if reports else []
    for report in reports.values():
        names += [name for name in report if name not in names]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"  {engine:>20}" for engine in reports)]
    for name in names:
        cells = [report.get(name, "not run") for report in reports.values()]
        shown = [" / ".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in cells]
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>20}" for cell in shown))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
