"""Run by ``test_start_on_gpu.py``: one start and its first answers, in a process whose Triton has compiled nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
from typing import Any

import numpy as np
from PIL import Image
from triton import knobs

import opsin.kernels.triton as our_kernels
from opsin import LLM, SamplingParams
from opsin.kernels import reference

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SIGN = "<|vision_start|><|image_pad|><|vision_end|>"


def prompts() -> list[Any]:
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((90, 70), (300, 400))]
    return [{"prompt": f"{SIGN}What is this?", "multi_modal_data": {"image": [x]}} for x in pictures] + ["Only text."]


def main(folder: str, way: str) -> None:
    heard: list[tuple[str, bool, bool]] = []  # name; was it on disk; did the main thread compile or load it

    def note(**told: Any) -> None:
        heard.append((told["src"].name, told["cache_hit"], threading.current_thread() is threading.main_thread()))

    logging.basicConfig(level=logging.INFO)
    knobs.compilation.listener = note
    if way == "one by one":
        our_kernels.KERNELS = dataclasses.replace(our_kernels.KERNELS, compile_ahead=reference.compile_ahead)
    settings: Any = {"dtype": "bfloat16", "max_model_len": 512, "kv_cache_memory_bytes": 2**26, "media_workers": 0}
    with LLM(folder, **settings) as llm:
        num_at_start = len(heard)
        ids = [output.outputs[0].token_ids for output in llm.generate(prompts(), GREEDY, use_tqdm=False)]
    print(json.dumps({"start": heard[:num_at_start], "answers": heard[num_at_start:], "ids": ids}))


if __name__ == "__main__":
    main(*sys.argv[1:])
