"""MiniCPM-V on a CUDA device: a CPU's greedy ids in float32 with TF32 off; the released size in its memory plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM, SamplingParams
from tests.engine.conftest import assert_idle
from tests.factories import minicpmv as factory

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SMALL: Any = {"dtype": "float32", "kv_cache_memory_bytes": 2**26, "media_workers": 0}


@pytest.fixture
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("name", factory.SHAPES)
def test_greedy_ids_equal_the_cpu_s(name: str, tmp_path: Path):
    """Which are the reference's, where Pillow is new enough."""
    folder = factory.write_minicpmv(tmp_path, factory.SHAPES[name])
    prompts = [case.prompt for case in factory.recorded_cases(name)]
    found: list[list[list[int]]] = []
    for device in ("cpu", "cuda"):
        with LLM(str(folder), device=device, **SMALL) as llm:
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            found.append([output.outputs[0].token_ids for output in outputs])
            assert_idle(llm)
    assert found[0] == found[1]


def test_released_size_runs_within_its_memory_plan(tmp_path: Path):
    """Random weights; a picture in nine slices beside one in none, and a video."""
    folder = factory.write_minicpmv(tmp_path, factory.SHAPES["plain"])
    (folder / "config.json").write_text(json.dumps(factory.hub_config()))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"scale_resolution": 448, "patch_size": 14, "image_feature_size": 64}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with LLM(str(folder), load_format="dummy", max_model_len=8192, media_workers=0) as llm:
        plan = llm.memory_plan
        data = {
            "image": [factory.picture(0, 1344, 1344), factory.picture(1, 400, 300)],
            "video": [[factory.picture(i, 640, 360) for i in range(8)]],
        }
        prompt: Any = {"prompt": f"{factory.IMAGE}{factory.IMAGE}{factory.VIDEO} What?", "multi_modal_data": data}
        outputs = llm.generate([prompt] * 4, GREEDY, use_tqdm=False)
        assert {output.num_media_tokens for output in outputs} == {(10 + 1 + 8) * 64}
        assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
        planned = plan.weight_bytes + plan.kv_bytes + plan.feature_bytes + plan.peak_step_bytes + plan.graph_bytes
        assert torch.cuda.max_memory_allocated() <= planned
        assert_idle(llm)
