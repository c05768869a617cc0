"""Run by ``test_ahead.py``: the kernels of a start, compiled for a GPU that is not there, and launched on nothing."""

from __future__ import annotations

import json
import logging
import sys
import threading
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import opsin.kernels.triton as our_kernels
from opsin.kernels.triton import overlap, varlen, varlen_hopper
from opsin.layers import Placement
from opsin.models import resolve
from opsin.models.hub import find_model
from opsin.models.weights import fill_randomly, pack
from opsin.processing.tokenizer import Tokenizer
from opsin.runner import memory
from opsin.runner.runner import ModelRunner

CPU = torch.device("cpu")
BUDGET: Any = {"max_num_tokens": 64, "max_num_seqs": 4, "max_model_len": 256}


@triton.jit
def fill_kernel(x_ptr, VALUE: tl.constexpr):
    tl.store(x_ptr, VALUE)


@triton.jit
def wrong_kernel(x_ptr):
    tl.store(x_ptr, tl.no_such_thing(x_ptr))  # pyright: ignore[reportAttributeAccessIssue]  it does not compile


class StandIn:
    """A driver of one H100 that is not there. What is launched does nothing but stand in ``launched``."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.loaded: list[tuple[str, bool]] = []  # by the main thread?
        self.utils = SimpleNamespace(
            load_binary=self.load, get_device_properties=lambda device: {"max_shared_mem": 232448}
        )

    def load(self, name: str, *rest: Any) -> tuple[Any, ...]:
        self.loaded.append((name, threading.current_thread() is threading.main_thread()))
        return 1, 2, 32, 0, 1024  # module, function, registers, spills, threads at most

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def launch(grid_0: int, grid_1: int, grid_2: int, stream: int, function: int, *rest: Any) -> None:
            assert function == 2, "launched before it was loaded"
            self.launched.append(src.name)

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def make_runner(folder: str) -> tuple[ModelRunner, Any]:
    files = find_model(folder, weights=False)
    family = resolve(files.config)
    tokenizer = Tokenizer.from_folder(files.folder, files.generation_config)
    rule = family.load_rule().from_hf(files.config, files.processor, tokenizer)
    place = Placement(our_kernels.KERNELS, CPU, torch.bfloat16)
    model = family.load_model().from_hf(files.config, place=place, norm=rule.norm)
    fill_randomly(model, 0)
    pack(model)
    settings: Any = {"max_num_seqs": 4, "max_model_len": 256, "block_size": 16}
    runner = ModelRunner(model, **settings, device=CPU, dtype=torch.bfloat16, kernels=our_kernels.KERNELS)
    return runner, [rule.layout("image", 250, 190, 1, {})] * 2


def start(stand_in: StandIn, folder: str) -> dict[str, Any]:
    """The kernels that an engine's start launches, with the lines of ``heard`` that tell of each."""
    heard: list[tuple[str, bool, bool]] = []  # name; was it on disk; did the main thread compile or load it

    def note(**told: Any) -> None:
        heard.append((told["src"].name, told["cache_hit"], threading.current_thread() is threading.main_thread()))

    knobs.compilation.listener = note
    runner, layouts = make_runner(folder)
    with (
        patch.object(torch.cuda, "CUDAGraph", object),  # a torch for CPUs has none
        patch.object(overlap, "capability", lambda device: (9, 0)),
    ):
        memory.compile_ahead(runner, **BUDGET, layouts=layouts, replays=True)
        ahead, launched_ahead, loaded_ahead = len(heard), list(stand_in.launched), list(stand_in.loaded)
        num_tokens, *rest = BUDGET.values()
        tokens = memory._tokens(runner, *memory._largest_step(num_tokens, *rest), emits=True)
        memory._run(runner, tokens, memory._pictures(runner, layouts, memory.MAX_RAW_PIXELS))
        runner.rehearse_graphs(num_tokens)  # in earnest now, but for the graphs
    assert (knobs.runtime.jit_cache_hook, knobs.compilation.listener) == (None, note), "who was there is gone"
    knobs.compilation.listener = None
    return {
        "ahead": heard[:ahead],
        "later": heard[ahead:],
        "loaded_ahead": loaded_ahead,
        "launched_ahead": launched_ahead,
        "launched": sorted(set(stand_in.launched)),
    }


def others(stand_in: StandIn) -> dict[str, Any]:
    """What is left alone, and what goes wrong."""
    x = torch.zeros(16)
    fill: Any = fill_kernel
    found: dict[str, Any] = {}

    def beside() -> None:
        fill[(1,)](x, VALUE=1)
        other = threading.Thread(target=lambda: fill[(1,)](x, VALUE=2))
        stand_in.launched.clear()
        other.start()
        other.join()
        found["launched_by_another_thread"] = list(stand_in.launched)

    our_kernels.compile_ahead(beside)

    our_kernels.compile_ahead(lambda: wrong_kernel[(1,)](x))
    try:
        wrong_kernel[(1,)](x)
    except triton.CompilationError:
        found["error_of_a_wrong_kernel"] = "as ever"

    def fail() -> None:
        fill[(1,)](x, VALUE=3)
        raise RuntimeError("no memory")

    our_kernels.compile_ahead(fail)
    stand_in.launched.clear()
    fill[(1,)](x, VALUE=3)
    found["launched_after_a_failure"] = list(stand_in.launched)

    def hopper() -> None:
        q, k, v = torch.empty(500, 48, 80, dtype=torch.bfloat16).split(16, dim=1)
        ends = torch.zeros(5, dtype=torch.int32)
        varlen_hopper.launch(q, k, v, ends, 0.1, varlen.head_parts(80))

    our_kernels.compile_ahead(hopper)
    knobs.compilation.listener = lambda **told: found.setdefault("hopper_later", told["src"].name)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    stand_in.launched.clear()
    hopper()
    found["hopper"] = list(stand_in.launched)
    return found


def main(part: str, folder: str) -> None:
    logging.basicConfig(level=logging.INFO)
    stand_in = StandIn()
    driver.set_active(cast(Any, stand_in))
    print(json.dumps(start(stand_in, folder) if part == "start" else others(stand_in)))


if __name__ == "__main__":
    main(*sys.argv[1:])
