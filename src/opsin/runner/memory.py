"""How much memory goes where: one step at full budgets is run and measured, the KV cache gets what is left.

On a GPU the allocator's own peak is read. On a CPU smaller steps are run, because a full one could take minutes there;
their tensors are counted, and scaled up.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsin.errors import ConfigError
from opsin.media.raw import MAX_RAW_PIXELS, raw_plan
from opsin.models.towers.patches import MAX_PASS
from opsin.params import SamplingParams
from opsin.runner.executor import MemoryPlan, Pixels
from opsin.runner.graphs import MAX_TOKENS
from opsin.runner.pixels import raw_bytes
from opsin.runner.runner import ModelRunner
from opsin.runner.trunk import MAX_PATCHES
from opsin.types import EncodeItem, MediaLayout, ModelSpec, RowPlan, SlotOpen, StepPlan

_GIB = 2**30
_CPU_MEASURED_TOKENS = 128
_CPU_MEASURED_PATCHES = 1024
_CPU_KV_BYTES = 4 * _GIB
_CPU_KV_SHARE = 0.4  # of the memory that is free at start: a laptop has other things to do
_GPU_HEADROOM = 0.02  # of the device: fragmentation, and libraries that allocate at first use


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
    max_raw_pixels: int = 0,
    decoded_bytes: int = 0,
    replays: bool = False,
) -> MemoryPlan:
    """Measure a step, then divide the device's memory.

    Args:
        max_num_tokens: the step's token budget.
        feature_bytes: set aside for vision features.
        utilization: share of a GPU that may be used.
        layouts: pictures that fill the vision budget once.
        kv_bytes: size of the KV cache when the caller fixed it.
        num_blocks: number of KV blocks when the caller fixed it; wins over ``kv_bytes``.
        max_raw_pixels: see ``media.raw.raw_plan``: pictures that the device resizes come as they are.
        decoded_bytes: set aside for pictures that the device decodes, and for its decoder.
        replays: steps will be replayed as graphs, whose memory is theirs alone.

    Raises:
        ConfigError: one request of ``max_model_len`` tokens would not fit.
    """
    weight_bytes = sum(p.numel() * p.element_size() for p in runner.model.parameters())
    on_gpu = runner.device.type == "cuda"
    graph_bytes = 0
    if on_gpu:
        peak = _measure_gpu(runner, max_num_tokens, max_num_seqs, max_model_len, layouts, max_raw_pixels)
        graph_bytes = int(peak * captured_share(max_num_tokens, layouts)) if replays else 0
        total = torch.cuda.get_device_properties(runner.device).total_memory
        free, _ = torch.cuda.mem_get_info(runner.device)
        outside = total - free - torch.cuda.memory_reserved(runner.device)  # other processes, and CUDA's own context
        used = outside + weight_bytes + peak + graph_bytes + feature_bytes + decoded_bytes
        available = int(total * (utilization - _GPU_HEADROOM)) - used
    else:
        free = _free_host_bytes()
        peak = _measure_cpu(runner, max_num_tokens, max_num_seqs, max_model_len, layouts)
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = min(_CPU_KV_BYTES, int(free * _CPU_KV_SHARE))

    spec = runner.model.spec
    block_bytes = spec.kv_bytes_per_token(runner.kv_dtype.itemsize) * runner.block_size
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
                f"graphs {graph_bytes / _GIB:.2f}, vision features {feature_bytes / _GIB:.2f}, "
                f"decoded pictures {decoded_bytes / _GIB:.2f}). "
                "Lower max_model_len or max_num_batched_tokens, or raise gpu_memory_utilization or "
                "kv_cache_memory_bytes." + (" With enforce_eager there are no graphs." if graph_bytes else "")
            )
    return MemoryPlan(
        total_bytes=total,
        weight_bytes=weight_bytes,
        kv_bytes=num_blocks * block_bytes,
        feature_bytes=feature_bytes,
        peak_step_bytes=peak,
        num_blocks=num_blocks,
        block_size=runner.block_size,
        graph_bytes=graph_bytes,
        decoded_bytes=decoded_bytes,
    )


def compile_ahead(
    runner: ModelRunner,
    *,
    max_num_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    layouts: Sequence[MediaLayout],
    replays: bool,
) -> None:
    """Have kernels compiled for the step that ``plan_memory`` measures, and for what is captured first.

    The arguments are those of ``plan_memory``.
    """

    def steps() -> None:
        tokens = _tokens(runner, *_largest_step(max_num_tokens, max_num_seqs, max_model_len), emits=True)
        _run(runner, tokens, _pictures(runner, layouts, MAX_RAW_PIXELS))
        _run(runner, _Tokens(), _pictures(runner, layouts[:1], MAX_RAW_PIXELS))  # few patches may take other kernels

    def graphs() -> None:
        runner.rehearse_graphs(max_num_tokens)

    runner.compile_ahead(steps, *([graphs] if replays else []))
    runner.allocate_kv(0)


def captured_share(num_tokens: int, layouts: Sequence[MediaLayout]) -> float:
    """The largest step that is captured, as a share of one of ``num_tokens`` and these equal pictures."""
    if not layouts:
        return min(1.0, MAX_TOKENS / num_tokens)
    one = layouts[0].num_patches
    num_patches = min(len(layouts), max(1, MAX_PASS // one)) * one  # of the largest pass that was measured
    return min(1.0, max(MAX_TOKENS / num_tokens, MAX_PATCHES / num_patches))


def describe(plan: MemoryPlan, spec: ModelSpec, max_model_len: int) -> str:
    """The memory plan as lines for a person."""
    used = plan.weight_bytes + plan.kv_bytes + plan.feature_bytes + plan.peak_step_bytes + plan.graph_bytes
    used += plan.decoded_bytes
    tokens = (plan.num_blocks - 1) * plan.block_size
    rows = [
        ("weights", plan.weight_bytes, ""),
        ("KV cache", plan.kv_bytes, f"{tokens:,} tokens; {tokens / max_model_len:.1f} requests of {max_model_len:,}"),
        ("vision features", plan.feature_bytes, f"{feature_rows(plan, spec):,} rows at most"),
        ("activations", plan.peak_step_bytes, "most that a step takes, measured"),
        *([("graphs", plan.graph_bytes, "for steps that are replayed")] if plan.graph_bytes else []),
        *([("decoded JPEGs", plan.decoded_bytes, "that wait for the tower")] if plan.decoded_bytes else []),
        ("left alone", max(0, plan.total_bytes - used), ""),
    ]
    return "\n".join(f"  {name:<16} {size / _GIB:8.2f} GiB  {note}".rstrip() for name, size, note in rows)


def feature_rows(plan: MemoryPlan, spec: ModelSpec) -> int:
    """Feature rows of 2 bytes a value that the feature cache holds."""
    return plan.feature_bytes // (2 * spec.feature_width)


def _measure_gpu(
    runner: ModelRunner,
    num_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    layouts: Sequence[MediaLayout],
    max_raw_pixels: int,
) -> int:
    torch.cuda.synchronize(runner.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(runner.device)
    torch.cuda.reset_peak_memory_stats(runner.device)
    tokens = _tokens(runner, *_largest_step(num_tokens, max_num_seqs, max_model_len), emits=True)
    _run(runner, tokens, _pictures(runner, layouts, max_raw_pixels))
    peak = torch.cuda.max_memory_allocated(runner.device) - before
    torch.cuda.empty_cache()
    # The largest raw picture may be much larger than those that were measured; the tower runs when it is gone.
    return max(peak, raw_bytes(max_raw_pixels) + sum(layout.plan.num_bytes for layout in layouts))


def _largest_step(num_tokens: int, max_num_seqs: int, max_model_len: int) -> tuple[int, int]:
    """Rows, and the tokens of each."""
    num_rows = min(max_num_seqs, num_tokens)
    return num_rows, max(1, min(num_tokens // num_rows, max_model_len - 1))


def _measure_cpu(
    runner: ModelRunner, num_tokens: int, max_num_seqs: int, max_model_len: int, layouts: Sequence[MediaLayout]
) -> int:
    """Tower, decoder and sampler by themselves, since what each takes grows with something else."""
    measured_layouts = layouts[: max(1, _CPU_MEASURED_PATCHES // layouts[0].num_patches)] if layouts else ()
    length = min(num_tokens, _CPU_MEASURED_TOKENS, max_model_len - 1)
    peaks = [
        _peak_of(runner, _tokens(runner, 1, length, emits=False), ()) * num_tokens // length,
        _peak_of(runner, _tokens(runner, min(max_num_seqs, num_tokens), 1, emits=True), ()),
    ]
    if measured_layouts:
        pictures = _pictures(runner, measured_layouts, 0)
        peaks.append(_peak_of(runner, _Tokens(), pictures) * len(layouts) // len(measured_layouts))
    return max(peaks)


def _peak_of(runner: ModelRunner, tokens: _Tokens, pictures: tuple[EncodeItem, ...]) -> int:
    with _TensorMeter() as meter:
        _run(runner, tokens, pictures)
    return meter.peak_bytes


class _TensorMeter(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, and how many there were at most at one time.

    The process's resident memory would tell less: what an earlier, larger step has freed may still be resident.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler, which takes a second, to keep it from what is not compiled anyway."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._live.values()))
        return result


class _Tokens(NamedTuple):
    """Requests for a measured step."""

    opened: tuple[SlotOpen, ...] = ()
    rows: tuple[RowPlan, ...] = ()


def _tokens(runner: ModelRunner, num_rows: int, length: int, *, emits: bool) -> _Tokens:
    """Requests of ``length`` tokens, with a KV cache just large enough; they draw in the most expensive way."""
    blocks = -(-length // runner.block_size)
    runner.allocate_kv(num_rows * blocks + 1)
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=0)
    return _Tokens(
        tuple(SlotOpen(i, [0] * length, length, params, i, None, 0, [], frozenset()) for i in range(num_rows)),
        tuple(
            RowPlan(i, 0, length, tuple(range(i * blocks + 1, (i + 1) * blocks + 1)), emits) for i in range(num_rows)
        ),
    )


def _pictures(runner: ModelRunner, layouts: Sequence[MediaLayout], max_raw_pixels: int) -> tuple[EncodeItem, ...]:
    """Black pictures, handed in and waiting for the tower."""
    items = tuple(EncodeItem(i, i.to_bytes(4, "big"), layout) for i, layout in enumerate(layouts))
    for item in items:
        raw = raw_plan(item.layout.plan, max_raw_pixels)
        size = (raw or item.layout.plan).num_bytes
        runner.put_payload(item.key, Pixels(np.zeros(size, dtype=np.uint8), raw is not None))
    return items


def _run(runner: ModelRunner, tokens: _Tokens, pictures: tuple[EncodeItem, ...]) -> None:
    runner.launch(StepPlan(0, tokens.rows, tokens.opened, pictures)).result()
    runner.launch(StepPlan(1, (), drop_features=tuple(item.feature_id for item in pictures)))


def _free_host_bytes() -> int:
    """Memory that could be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
