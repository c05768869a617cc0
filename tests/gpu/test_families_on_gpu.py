"""Every family on a CUDA device: in float32 with TF32 off its greedy ids are transformers', graphs or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM, SamplingParams
from tests.engine.conftest import assert_idle, picture
from tests.factories.families import FAMILIES

pytestmark = pytest.mark.gpu

MAX_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
SMALL: Any = {"dtype": "float32", "kv_cache_memory_bytes": 2**26, "media_workers": 0}
CASES = [pytest.param(row, name, id=f"{row.name}-{name}") for row in FAMILIES for name in row.served]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("family", "name"), CASES)
def test_greedy_ids_equal_transformers_on_the_device(family: Any, name: str, tmp_path: Path):
    folder = family.write(tmp_path, family.shapes[name])
    model = family.load(folder)
    prompts: list[Any] = []
    expected: list[list[int]] = []
    for sizes in family.asked:
        images = [picture(width * height + i, width, height) for i, (width, height) in enumerate(sizes)]
        text = f"USER: {family.signs(len(sizes))}\nWhat is this? ASSISTANT:"
        inputs = family.hf_inputs(folder, text, images) if images else family.hf_inputs(folder, text)
        generated = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=None)
        expected.append(generated[0, inputs["input_ids"].shape[1] :].tolist())
        prompts.append({"prompt": text, "multi_modal_data": {"image": images}} if images else text)
    for settings in ({}, {"enforce_eager": True}):
        with LLM(str(folder), **SMALL, **settings) as llm:
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected, settings
            assert_idle(llm)
