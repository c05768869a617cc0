"""What a model's Triton kernels become: variants, compile times, registers, spills. Needs no GPU.

    python benchmarks/kernels_built.py FOLDER [--sm 90] [--sm 80 ...] [--dtype bfloat16] [--fp8-cache]
        [--json FILE]

FOLDER is a checkpoint, or one without weights (``benchmarks/shapes.py`` writes some). The model runs on torch's meta
device, in the steps that an engine's start and its first requests run; what it would launch is noted, with everything
that makes Triton compile another variant, and compiled ahead of time. So the table is also a list of what a cold start
compiles. Compile times are of this machine's processor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

import opsin.kernels.triton as our_kernels
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.quantized import FP8
from opsin.kernels.triton import device, overlap
from opsin.layers import Placement
from opsin.media.raw import MAX_RAW_PIXELS, raw_plan
from opsin.models import resolve
from opsin.models.hub import find_model
from opsin.models.interface import VisionLanguageModel
from opsin.models.rule import MediaRule
from opsin.models.weights import pack
from opsin.processing.tokenizer import Tokenizer
from opsin.runner.executor import Pixels
from opsin.runner.graphs import decode_sizes
from opsin.runner.pixels import PixelLoader
from opsin.runner.tower import cut_tiles

META = torch.device("meta")
BLOCK_SIZE, MAX_ROWS, MAX_LEN = 16, 256, 8192
PREFILLS = (128, 1024)  # graphs; all sizes between have the same variants
STEPS = ((1, 333), (1, 2048), (2, 700), (7, 3001), (16, 8192))  # (rows, tokens) of eager ones
PICTURES = (((640, 480),), ((1024, 768),), ((640, 480),) * 7, ((640, 480),) * 16)


class Launch(NamedTuple):
    """A variant of a kernel, as Triton's just-in-time compiler would ask for it."""

    source: ASTSource
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.source.name} {self.source.hash()} {sorted(self.options.items(), key=str)}"


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled variant. ``seconds`` of processor time, the assembler's included; ``spilled`` in bytes of a thread's
    stack, ``shared`` in bytes of a program. ``waits``: it is launched before the kernel ahead of it has ended;
    ``early_loads`` and ``early_stores``: instructions ahead of its waiting for that end."""

    sm: int
    kernel: str
    variant: str
    warps: int
    stages: int
    seconds: float
    registers: int
    spilled: int
    shared: int
    waits: bool
    early_loads: int
    early_stores: int


@contextmanager
def noting_launches(sm: int) -> Iterator[dict[str, Launch]]:
    """Inside, launches of kernels do nothing but add what they would compile for compute capability ``sm``."""
    backend = make_backend(GPUTarget("cuda", sm, 32))
    noted: dict[str, Launch] = {}

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        kind = GluonASTSource if self.is_gluon() else ASTSource
        launch = Launch(kind(self, signature, constants, attributes), dict(options.__dict__))
        noted[launch.key] = launch

    def not_meta(_: torch.device) -> tuple[int, int]:
        return divmod(sm, 10)

    def forget() -> None:
        for known in (device.hopper_kernel, device.num_multiprocessors):
            known.cache_clear()

    with (
        patch.object(JITFunction, "run", note),
        patch.object(device, "capability", not_meta),
        patch.object(overlap, "capability", not_meta),
        patch.object(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)),
    ):
        forget()
        yield noted
    forget()


def open_model(folder: str, dtype: torch.dtype) -> tuple[VisionLanguageModel, MediaRule]:
    """A checkpoint's model, without memory for its weights, and its family's rule."""
    files = find_model(folder, weights=False)
    family = resolve(files.config)
    rule = family.load_rule().from_hf(
        files.config, files.processor, Tokenizer.from_folder(files.folder, files.generation_config)
    )
    place = Placement(our_kernels.KERNELS, META, dtype)
    model = family.load_model().from_hf(files.config, place=place, norm=rule.norm)
    pack(model)
    return model, rule


def attention_inputs(query_lens: Sequence[int], num_tokens: int, context: int, columns: int) -> AttentionInputs:
    num_rows = len(query_lens)
    return AttentionInputs(
        query_start_B1=torch.empty(num_rows + 1, dtype=torch.int32, device=META),
        context_lens_B=torch.empty(num_rows, dtype=torch.int32, device=META),
        block_tables_BL=torch.empty(num_rows, columns, dtype=torch.int32, device=META),
        slot_mapping_T=torch.empty(num_tokens, dtype=torch.int64, device=META),
        query_lens=tuple(query_lens),
        context_lens=(context,) * num_rows,
    )


def run_decoder(model: VisionLanguageModel, kv_dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """By name, what an engine's start captures and what its first steps launch."""
    caches = [
        LayerCache(
            *(torch.empty(64, BLOCK_SIZE, x.num_kv_heads, x.head_dim, dtype=kv_dtype, device=META) for _ in "kv")
        )
        for x in model.spec.layers
    ]

    def step(query_lens: Sequence[int], num_tokens: int, context: int, columns: int) -> None:
        inputs = attention_inputs(query_lens, num_tokens, context, columns)
        positions = torch.empty(model.spec.num_position_axes, num_tokens, dtype=torch.int64, device=META)
        hidden = model.embed(torch.empty(num_tokens, dtype=torch.int64, device=META))
        hidden = model.forward(hidden, positions, inputs, caches)
        our_kernels.KERNELS.greedy(model.ranking(hidden[: len(query_lens)]))

    def decodes() -> None:
        for size in decode_sizes(MAX_ROWS):
            step((1,) * size, size, MAX_LEN + 1, MAX_LEN // BLOCK_SIZE + 1)

    def prefills() -> None:
        for size in PREFILLS:
            step((1, *(size,) * MAX_ROWS), size, MAX_LEN + 1, MAX_LEN // BLOCK_SIZE + 1)

    def eager() -> None:
        for num_rows, num_tokens in STEPS:
            each = num_tokens // num_rows
            for context in (each, each + 500, MAX_LEN):
                step((each,) * num_rows, each * num_rows, context, -(-context // BLOCK_SIZE))

    return {"decode graphs": decodes, "prefill graphs": prefills, "eager steps": eager}


def run_tower(model: VisionLanguageModel, rule: MediaRule) -> Callable[[], None]:
    def pictures() -> None:
        for sizes in PICTURES:
            layouts = [rule.layout("image", width, height, 1, {}) for width, height in sizes]
            flats = [torch.empty(layout.plan.num_bytes, dtype=torch.uint8, device=META) for layout in layouts]
            model.encode([cut_tiles(*pair) for pair in zip(flats, layouts, strict=True)], layouts)

    return pictures


def run_resize(rule: MediaRule) -> Callable[[], None]:
    def pictures() -> None:
        loader = PixelLoader(our_kernels.KERNELS.resample, META)
        for (width, height), *_ in PICTURES:
            plan = rule.layout("image", width, height, 1, {}).plan
            assert raw_plan(plan, MAX_RAW_PIXELS) is not None, f"this model takes {width} x {height} pixels as they are"
            loader.load(Pixels(np.zeros(width * height * 3, np.uint8), is_raw=True), plan)

    return pictures


@torch.inference_mode()
def launches(folder: str, sm: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> dict[str, dict[str, Launch]]:
    """Variants by the part of a start that meets them first, and by key."""
    model, rule = open_model(folder, dtype)
    parts = {**run_decoder(model, kv_dtype), "resize": run_resize(rule), "tower": run_tower(model, rule)}
    found: dict[str, dict[str, Launch]] = {}
    for name, run in parts.items():
        with noting_launches(sm) as noted:
            run()
        known = {key for earlier in found.values() for key in earlier}
        found[name] = {key: launch for key, launch in noted.items() if key not in known}
    return found


def build(launch: Launch, sm: int) -> Built:
    """Compile one variant, whatever Triton's cache holds, and read what the assembler allotted."""
    source = launch.source
    began = sum(os.times()[:4])
    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options)
    seconds = sum(os.times()[:4]) - began
    names = source.fn.arg_names
    constants = {names[at[0]]: value for at, value in source.constants.items() if len(at) == 1}
    divisible = {names[at[0]] for at, attribute in source.attrs.items() if attribute}
    integers = [name for name, kind in source.signature.items() if kind in ("i32", "i64")]
    marks = [f"{name}{'%16' if name in divisible else ''}" for name in integers]
    usage = resource_usage(kernel.asm["cubin"])
    early, waited, _ = kernel.asm["ptx"].partition("griddepcontrol.wait")
    assert bool(waited) == launch.options["launch_pdl"], (
        f"{source.name} is launched early and does not wait, or vice versa"
    )
    return Built(
        sm=sm,
        kernel=source.name,
        variant=" ".join([*(f"{name}={value}" for name, value in constants.items()), *marks]),
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        seconds=round(seconds, 2),
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        waits=bool(waited),
        early_loads=early.count("ld.global") if waited else 0,
        early_stores=early.count("st.global") if waited else 0,
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says of a binary with one function: REG, STACK, LOCAL, ..."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    last = next(line for line in printed.splitlines() if "REG:" in line)
    pairs = (word.partition(":") for word in last.split())
    return {name: int(value) for name, _, value in pairs if value.isdigit()}


def table(rows: Iterable[Built]) -> str:
    lines = [
        "| sm | kernel | variant | warps | s | registers | spilled B | shared B |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {x.sm} | {x.kernel.strip('_')} | {x.variant} | {x.warps} | {x.seconds:.2f} | {x.registers} | {x.spilled} "
        f"| {x.shared} |"
        for x in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile a model's Triton kernels ahead of time; needs no GPU.")
    parser.add_argument("folder")
    parser.add_argument("--sm", type=int, action="append", help="compute capability, times ten; several are allowed")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--fp8-cache", action="store_true", help="with a KV cache of 8-bit floats")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="count the variants, compile nothing")
    args = parser.parse_args()
    built: list[Built] = []
    for sm in args.sm or [90]:
        dtype = getattr(torch, args.dtype)
        found = launches(args.folder, sm, dtype, FP8 if args.fp8_cache else dtype)
        for name, part in found.items():
            print(f"sm_{sm}, {name}: {len(part)} variants met first")
        if args.list:
            continue
        built += [build(launch, sm) for part in found.values() for launch in part.values()]
    print(table(built))
    print(f"{len(built)} variants, {sum(x.seconds for x in built):.1f} s of compiling; Triton {triton.__version__}")
    if args.json:
        args.json.write_text(json.dumps([asdict(x) for x in built], indent=1))


if __name__ == "__main__":
    main()
