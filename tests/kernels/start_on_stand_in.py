"""Run by ``test_ahead.py``: the kernels of a start, compiled for a GPU that is not there, and launched on nothing."""

from __future__ import annotations

import json
import sys
import threading
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import opsin.kernels.triton as our_kernels
from opsin.layers import Placement
from opsin.models import resolve
from opsin.models.hub import find_model
from opsin.models.weights import fill_randomly, pack
from opsin.processing.tokenizer import Tokenizer
from opsin.runner import memory
from opsin.runner.runner import ModelRunner

CPU = torch.device("cpu")
BUDGET: Any = {"max_num_tokens": 64, "max_num_seqs": 4, "max_model_len": 256}


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


def main(folder: str, asks: str) -> None:
    stand_in = StandIn()
    driver.set_active(cast(Any, stand_in))
    heard: list[tuple[str, bool, bool]] = []

    def note(**told: Any) -> None:
        heard.append((told["src"].name, told["cache_hit"], threading.current_thread() is threading.main_thread()))

    knobs.compilation.listener = note
    runner, layouts = make_runner(folder)
    with patch.object(torch.cuda, "CUDAGraph", object):  # a torch for CPUs has none
        if asks == "ahead":
            memory.compile_ahead(runner, **BUDGET, layouts=layouts, replays=True)
        ahead, launched_ahead = list(heard), list(stand_in.launched)
        loaded_ahead = list(stand_in.loaded)
        num_tokens, *rest = BUDGET.values()
        tokens = memory._tokens(runner, *memory._largest_step(num_tokens, *rest), emits=True)
        memory._run(runner, tokens, memory._pictures(runner, layouts, memory.MAX_RAW_PIXELS))
        runner.rehearse_graphs(num_tokens)  # in earnest now, but for the graphs
    hooks = knobs.runtime.jit_cache_hook, knobs.compilation.listener
    assert hooks == (None, note), "what the engine found there is no longer there"
    print(
        json.dumps(
            {
                "ahead": ahead,
                "loaded_ahead": loaded_ahead,
                "launched_ahead": launched_ahead,
                "later": heard[len(ahead) :],
                "loaded": stand_in.loaded,
                "launched": sorted(set(stand_in.launched)),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
