"""Every family on a CUDA device: in float32 with TF32 off its greedy ids are those of the CPU, graphs or none.

There ``tests/engine`` holds them to transformers', whose releases differ in what they make of some models on a GPU box.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM, SamplingParams
from opsin.config import EngineSettings
from tests.engine.conftest import assert_idle, picture
from tests.factories.families import FAMILIES

pytestmark = pytest.mark.gpu

MAX_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
BUDGETS: list[EngineSettings] = [{}, {"enforce_eager": True}]
SMALL: Any = {"dtype": "float32", "kv_cache_memory_bytes": 2**26, "media_workers": 0}
CASES = [pytest.param(row, name, id=f"{row.name}-{name}") for row in FAMILIES for name in row.served]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("family", "name"), CASES)
def test_greedy_ids_on_the_device_equal_the_cpu_s(family: Any, name: str, tmp_path: Path):
    folder = family.write(tmp_path, family.shapes[name])
    prompts: list[Any] = []
    for sizes in family.asked:
        images = [picture(width * height + i, width, height) for i, (width, height) in enumerate(sizes)]
        text = f"USER: {family.image * len(sizes)}\nWhat is this? ASSISTANT:"
        prompts.append({"prompt": text, "multi_modal_data": {"image": images}} if images else text)
    with LLM(str(folder), device="cpu", **SMALL) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    for settings in BUDGETS:
        with LLM(str(folder), **SMALL, **settings) as llm:
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected, settings
            assert_idle(llm)
