"""How much memory goes where: one step at full budgets is run and measured, the KV cache gets what is left.

On a GPU the allocator's own peak is read. On a CPU a smaller step is run, because a full one could take minutes there;
the growth of the process's resident memory is read and scaled up.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from opsin.errors import ConfigError
from opsin.params import SamplingParams
from opsin.runner.executor import MemoryPlan, Pixels
from opsin.runner.runner import ModelRunner
from opsin.types import EncodeItem, MediaLayout, ModelSpec, RowPlan, SlotOpen, StepPlan

_GIB = 2**30
_CPU_MEASURED_TOKENS = 128
_CPU_MEASURED_PATCHES = 1024
_CPU_KV_BYTES = 4 * _GIB
_CPU_KV_SHARE = 0.4  # of the memory that is free at start: a laptop has other things to do
_GPU_HEADROOM = 0.01  # of the device: fragmentation, and libraries that allocate at first use


def plan_memory(
    runner: ModelRunner,
    *,
    max_num_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    feature_bytes: int,
    utilization: float,
    layouts: Sequence[MediaLayout],
    kv_bytes: int | None = None,
    num_blocks: int | None = None,
) -> MemoryPlan:
    """Measure a step, then divide the device's memory.

    Args:
        max_num_tokens: the step's token budget.
        feature_bytes: set aside for vision features.
        utilization: share of a GPU that may be used.
        layouts: pictures that fill the vision budget once.
        kv_bytes: size of the KV cache when the caller fixed it.
        num_blocks: number of KV blocks when the caller fixed it; wins over ``kv_bytes``.

    Raises:
        ConfigError: one request of ``max_model_len`` tokens would not fit.
    """
    weight_bytes = sum(p.numel() * p.element_size() for p in runner.model.parameters())  # type: ignore[attr-defined]
    on_gpu = runner.device.type == "cuda"
    if on_gpu:
        peak = _measure_gpu(runner, max_num_tokens, max_num_seqs, max_model_len, layouts)
        total = torch.cuda.get_device_properties(runner.device).total_memory
        free, _ = torch.cuda.mem_get_info(runner.device)
        outside = total - free - torch.cuda.memory_reserved(runner.device)  # other processes, and CUDA's own context
        available = int(total * (utilization - _GPU_HEADROOM)) - outside - weight_bytes - peak - feature_bytes
    else:
        free = _free_host_bytes()
        peak = _measure_cpu(runner, max_num_tokens, max_num_seqs, max_model_len, layouts)
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = min(_CPU_KV_BYTES, int(free * _CPU_KV_SHARE))

    spec = runner.model.spec
    block_bytes = spec.kv_bytes_per_token(runner.dtype.itemsize) * runner.block_size
    per_sequence = -(-max_model_len // runner.block_size)
    if num_blocks is None:
        if kv_bytes is None and not on_gpu:  # more than this could only hold old prefixes
            kv_bytes = min(available, (max_num_seqs * per_sequence + 1) * block_bytes)
        num_blocks = max(0, available if kv_bytes is None else kv_bytes) // block_bytes
        if num_blocks < per_sequence + 1:
            raise ConfigError(
                f"One request of max_model_len={max_model_len} tokens needs "
                f"{(per_sequence + 1) * block_bytes / _GIB:.2f} GiB of KV cache and "
                f"{max(0, available if kv_bytes is None else kv_bytes) / _GIB:.2f} GiB are left "
                f"(weights {weight_bytes / _GIB:.2f}, activations {peak / _GIB:.2f}, "
                f"vision features {feature_bytes / _GIB:.2f}). "
                "Lower max_model_len or max_num_batched_tokens, or raise gpu_memory_utilization or "
                "kv_cache_memory_bytes."
            )
    return MemoryPlan(
        total_bytes=total,
        weight_bytes=weight_bytes,
        kv_bytes=num_blocks * block_bytes,
        feature_bytes=feature_bytes,
        peak_step_bytes=peak,
        num_blocks=num_blocks,
        block_size=runner.block_size,
    )


def describe(plan: MemoryPlan, spec: ModelSpec, max_model_len: int) -> str:
    """The memory plan as lines for a person."""
    used = plan.weight_bytes + plan.kv_bytes + plan.feature_bytes + plan.peak_step_bytes
    tokens = (plan.num_blocks - 1) * plan.block_size
    rows = [
        ("weights", plan.weight_bytes, ""),
        ("KV cache", plan.kv_bytes, f"{tokens:,} tokens; {tokens / max_model_len:.1f} requests of {max_model_len:,}"),
        ("vision features", plan.feature_bytes, f"{feature_rows(plan, spec):,} rows at most"),
        ("activations", plan.peak_step_bytes, "most that a step takes, measured"),
        ("left alone", max(0, plan.total_bytes - used), ""),
    ]
    return "\n".join(f"  {name:<16} {size / _GIB:8.2f} GiB  {note}".rstrip() for name, size, note in rows)


def feature_rows(plan: MemoryPlan, spec: ModelSpec) -> int:
    """Feature rows of 2 bytes a value that the feature cache holds."""
    return plan.feature_bytes // (2 * spec.feature_width)


def _measure_gpu(
    runner: ModelRunner, num_tokens: int, max_num_seqs: int, max_model_len: int, layouts: Sequence[MediaLayout]
) -> int:
    torch.cuda.synchronize(runner.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(runner.device)
    torch.cuda.reset_peak_memory_stats(runner.device)
    _run_full_step(runner, num_tokens, max_num_seqs, max_model_len, layouts)
    peak = torch.cuda.max_memory_allocated(runner.device) - before
    torch.cuda.empty_cache()
    return peak


def _measure_cpu(
    runner: ModelRunner, num_tokens: int, max_num_seqs: int, max_model_len: int, layouts: Sequence[MediaLayout]
) -> int:
    measured_tokens = min(num_tokens, _CPU_MEASURED_TOKENS)
    count = max(1, _CPU_MEASURED_PATCHES // layouts[0].num_patches) if layouts else 0
    measured_layouts = layouts[:count]
    # The first step ever also pays for libraries that set themselves up.
    _run_full_step(runner, min(num_tokens, 8), 1, max_model_len, layouts[:1])
    before = _resident_bytes()
    _reset_peak_resident()
    _run_full_step(runner, measured_tokens, max_num_seqs, max_model_len, measured_layouts)
    grown = max(0, _peak_resident_bytes() - before)
    return int(grown * max(num_tokens / measured_tokens, len(layouts) / max(1, len(measured_layouts))))


def _run_full_step(
    runner: ModelRunner, num_tokens: int, max_num_seqs: int, max_model_len: int, layouts: Sequence[MediaLayout]
) -> None:
    """The largest step of ``num_tokens``: as many rows as may be, all of them sampling with top-p, and pictures."""
    num_rows = min(max_num_seqs, num_tokens)
    length = max(1, min(num_tokens // num_rows, max_model_len - 1))
    blocks_per_row = -(-length // runner.block_size)
    runner.allocate_kv(num_rows * blocks_per_row + 1)
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=0)
    opened = tuple(
        SlotOpen(slot, [0] * length, length, params, slot, None, 0, [], frozenset()) for slot in range(num_rows)
    )
    rows = tuple(
        RowPlan(slot, 0, length, tuple(range(slot * blocks_per_row + 1, (slot + 1) * blocks_per_row + 1)), True)
        for slot in range(num_rows)
    )
    keys = [index.to_bytes(4, "big") for index in range(len(layouts))]
    for key, layout in zip(keys, layouts, strict=True):
        runner.put_payload(key, Pixels(np.zeros(layout.plan.num_bytes, dtype=np.uint8)))
    encode = tuple(EncodeItem(i, key, layout) for i, (key, layout) in enumerate(zip(keys, layouts, strict=True)))
    runner.launch(StepPlan(0, rows, opened, encode)).result()
    runner.launch(StepPlan(1, (), drop_features=tuple(range(len(layouts)))))


def _free_host_bytes() -> int:
    """Memory that could be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_resident_bytes()


def _reset_peak_resident() -> None:
    """Let the kernel's high-water mark start anew, where it allows that (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_resident_bytes() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
