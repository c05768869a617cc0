"""Every kernel that an engine launches, compiled for GPUs that are not there, in the true shapes of released models."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.factories.released import RELEASED, write_dummy

READ_WEIGHTS = {"_row_kernel", "_rms_norm_kernel"}
DECODE_CHAIN = {*READ_WEIGHTS, "_gate_kernel", "_rope_and_write_kernel", "_attention_kernel", "_join_kernel"}
DECODE_CHAIN |= {"_greedy_part_kernel", "_greedy_kernel", "_quantize_kernel"}
SHARED_KIB = {80: 163, 90: 227}  # that a program may have
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(folder: Path, *options: str) -> tuple[str, list[dict[str, Any]]]:
    """What ``benchmarks/kernels_built.py`` prints, and its table. In a process of its own, with Triton's compiler."""
    found = folder / "built.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    script = ROOT / "benchmarks" / "kernels_built.py"
    command = [sys.executable, str(script), str(folder), "--json", str(found), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(found.read_text())


def checkpoint(folder: Path, name: str) -> Path:
    (released,) = (x for x in RELEASED if x.hub_id.endswith(name))
    return write_dummy(folder, released)


def test_steps_of_any_size_launch_what_the_graphs_already_compiled(tmp_path: Path):
    """Else a server stands still for a second in the midst of serving."""
    printed, _ = run(checkpoint(tmp_path, "/Qwen2-VL-2B-Instruct"), "--list")
    assert "eager steps: 0 variants" in printed
    assert "decode graphs: 0 variants" not in printed
    assert "resize: 2 variants" in printed  # down and across, whatever the sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "capabilities"),
    [
        ("/Qwen2-VL-2B-Instruct", (80, 90)),  # heads of 128, of 80 in the tower
        ("/Phi-3.5-vision-instruct", (90,)),  # 96, 64
        ("/gemma-3-4b-it", (90,)),  # 256, 72
    ],
)
def test_kernels_compile_ahead_of_time(tmp_path: Path, name: str, capabilities: tuple[int, ...]):
    _, built = run(checkpoint(tmp_path, name), *(word for sm in capabilities for word in ("--sm", str(sm))))
    for sm in capabilities:
        rows = [row for row in built if row["sm"] == sm]
        names = {row["kernel"] for row in rows}
        assert {"_attention_kernel", "_rms_norm_kernel", "_varlen_kernel", "_resample_kernel"} <= names
        for row in rows:
            assert row["shared"] <= SHARED_KIB[sm] * 1024, row
            assert sm != 90 or not row["spilled"], row  # for an H100 the kernels are tuned
            # The rules of opsin.kernels.triton.overlap, as the compiler left them.
            assert row["waits"] == (sm >= 90 and row["kernel"] in DECODE_CHAIN), row
            assert row["early_stores"] == 0, row
            assert not row["waits"] or bool(row["early_loads"]) == (row["kernel"] in READ_WEIGHTS), row


@pytest.mark.slow
def test_kernels_of_a_cache_of_8_bits_compile_ahead_of_time(tmp_path: Path):
    _, built = run(checkpoint(tmp_path, "/Qwen2-VL-2B-Instruct"), "--sm", "90", "--fp8-cache")
    assert {"_attention_kernel", "_rope_and_write_kernel"} <= {row["kernel"] for row in built}


HOPPER = """
import re, subprocess, sys, torch, triton
from pathlib import Path
from triton import knobs
from triton.backends.compiler import GPUTarget
from kernels_built import attention_inputs, noting_launches, resource_usage
from opsin.kernels.inputs import LayerCache
from opsin.kernels.triton import paged_hopper, varlen, varlen_hopper

kind, size = sys.argv[1], int(sys.argv[2])
with noting_launches(90) as noted:
    q, k, v = torch.empty(500, 48, size, dtype=torch.bfloat16, device="meta").split(16, dim=1)
    if kind == "towers":
        varlen_hopper.launch(q, k, v, torch.empty(5, dtype=torch.int32, device="meta"), 0.1, varlen.head_parts(size))
    else:
        cache = LayerCache(*(torch.empty(9, 16, 2, size, dtype=torch.bfloat16, device="meta") for _ in "kv"))
        for inputs in (attention_inputs((500,), 500, 500, 32), attention_inputs((1, *(499,) * 256), 500, 4096, 256)):
            paged_hopper.launch(q, torch.empty_like(q), cache, inputs, 0.1, skips_singles=1 in inputs.query_lens)
(launch,) = noted.values()  # one for all steps
kernel = triton.compile(launch.source, target=GPUTarget("cuda", 90, 32), options=launch.options)
usage = resource_usage(kernel.asm["cubin"])
assert usage["LOCAL"] == 0, usage
assert usage["STACK"] <= (0 if kind == "towers" else 32), usage  # a few registers, ahead of the loops over keys
assert kernel.metadata.shared <= 227 * 1024, kernel.metadata
assert re.search(r"wgmma\\.wait_group\\.sync\\.aligned [12];", kernel.asm["ptx"]), "it waits for all products"
Path("kernel.ptx").write_text(kernel.asm["ptx"])
command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
done = subprocess.run(command, check=True, capture_output=True, text=True)
assert "Compiling entry function" in done.stderr
assert "serialized" not in done.stderr, done.stderr
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"),
    [("towers", 64), ("towers", 80), ("towers", 128), ("prompts", 64), ("prompts", 96), ("prompts", 128)],
)
def test_attention_on_hopper_overlaps_its_products(tmp_path: Path, kind: str, size: int):
    """ptxas says so where it makes products wait that were asked for at once."""
    script = tmp_path / "hopper.py"
    script.write_text(HOPPER)
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT / "benchmarks")))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": paths}
    command = [sys.executable, str(script), kind, str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
