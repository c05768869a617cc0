"""Every checkpoint that opsin names, at its released size: dummy weights on a GPU, within the memory plan.

A few of them run with one layer on a CPU, so that these tests are themselves tried where there is no GPU.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM, PoolingParams, SamplingParams
from opsin.types import ModelSpec
from tests.engine.conftest import assert_idle, picture
from tests.factories.released import RELEASED, Released, write_dummy
from tests.models.driver import meta_model

MAX_MODEL_LEN = 8192
LARGE = 13  # billions of parameters; larger ones are left out by -m "gpu and not slow"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
QUICK = ("google/paligemma2-3b-pt-224", "MrLight/dse-qwen2-2b-mrl-v1")  # pictures of few tokens
ASKED = ([], [(640, 480)], [(320, 160), (160, 320)], [(640, 480)])  # sizes of pictures by prompt


def over(checkpoints: Iterable[Released]) -> Any:
    """Run a test for each; ``-k`` takes part of its name."""
    cases = [
        pytest.param(
            released,
            id=released.hub_id.rpartition("/")[2],
            marks=[pytest.mark.slow] if released.billions > LARGE else [],
        )
        for released in checkpoints
    ]
    return pytest.mark.parametrize("released", cases)


def ask(llm: LLM, spec: ModelSpec, *, for_vectors: bool) -> None:
    """One prompt, then a batch of them, with no picture, one and two."""
    rule: Any = llm._front.inputs.rule
    prompts: list[Any] = []
    features: list[int] = []
    for sizes in ASKED:
        signs = (rule.placeholder("image").text.replace("{index}", str(i + 1)) for i in range(len(sizes)))
        images = [picture(i, *size) for i, size in enumerate(sizes)]
        media = {"multi_modal_data": {"image": images}} if images else {}
        prompts.append({"prompt": f"{''.join(signs)}\nWhat is this?", **media})
        features.append(sum(rule.layout("image", *size, 1, {}).num_features for size in sizes))
    for some, expected in ((prompts[1:2], features[1:2]), (prompts, features)):
        if for_vectors:
            outputs: list[Any] = llm.embed(some, PoolingParams(), use_tqdm=False)
            for output in outputs:
                vector = output.outputs.embedding
                assert len(vector) == spec.hidden_size
                assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-2)
        else:
            outputs = llm.generate(some, GREEDY, use_tqdm=False)
            for output in outputs:
                answer = output.outputs[0]
                assert len(answer.token_ids) == GREEDY.max_tokens
                assert answer.cumulative_logprob is not None
                assert math.isfinite(answer.cumulative_logprob)
        assert [output.prompt_token_ids.count(rule.image_token_id) for output in outputs] == expected
    assert_idle(llm)


@contextmanager
def dummy(released: Released, folder: Path, **settings: Any) -> Iterator[tuple[LLM, ModelSpec]]:
    """An engine for a checkpoint, its weights random."""
    spec = meta_model(released.config).spec
    settings |= {"max_model_len": min(MAX_MODEL_LEN, spec.max_position), "max_num_seqs": 8, "media_workers": 0}
    runner: Any = "pooling" if released.pools else "generate"
    with LLM(str(write_dummy(folder, released)), load_format="dummy", runner=runner, **settings) as llm:
        yield llm, spec


@pytest.mark.gpu
@over(RELEASED)
def test_released_size_runs_within_its_memory_plan(released: Released, tmp_path: Path):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with dummy(released, tmp_path) as (llm, spec):
        ask(llm, spec, for_vectors=released.pools)
        plan = llm.memory_plan
    assert plan.weight_bytes == pytest.approx(2e9 * released.billions, rel=0.1)
    planned = plan.weight_bytes + plan.kv_bytes + plan.feature_bytes + plan.peak_step_bytes + plan.graph_bytes
    assert torch.cuda.max_memory_allocated() - before <= planned


def with_one_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a config.json that of a decoder with one layer and few words, and of a tower with two layers."""
    text: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 1024}
    given = config.get("vision_config") or {}
    lists = {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
    vision = {"depth" if "depth" in given else "num_hidden_layers": 2, **{k: v for k, v in lists.items() if k in given}}
    return {**({"text_config": text} if "text_config" in config else text), "vision_config": vision}


@pytest.mark.slow
@over(released for released in RELEASED if released.hub_id in QUICK)
def test_one_layer_of_released_width_runs(released: Released, tmp_path: Path):
    small: Any = {"device": "cpu", "kv_cache_memory_bytes": 2**28, "max_num_batched_tokens": 1024}
    with dummy(released, tmp_path, **small, hf_overrides=with_one_layer(released.config)) as (llm, spec):
        ask(llm, spec, for_vectors=released.pools)
