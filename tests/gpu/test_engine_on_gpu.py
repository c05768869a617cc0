"""The engine on a CUDA device: the same tokens as transformers there, under every budget, and a memory plan that holds.

float32 with TF32 off, so that greedy ids can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM, SamplingParams
from opsin.config import EngineSettings
from opsin.kernels import reference
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.runner.sampler import _gumbel, _row_key
from tests.engine.conftest import asked, assert_idle, hf_model
from tests.factory import LlavaShape

pytestmark = pytest.mark.gpu

BUDGETS: list[EngineSettings] = [
    {},
    {"pipeline_depth": 1},
    {"max_num_batched_tokens": 7},
    {"num_gpu_blocks_override": 26, "block_size": 4},
]
SMALL: Any = {"dtype": "float32", "kv_cache_memory_bytes": 2**26}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS: list[Any] = [
    asked(1),
    asked(2, 3),
    "Only text here.",
    asked(4, text="Describe every colour."),
    asked(1, 1, 5),
    asked(6),
]
SHAPES = {
    "gqa": LlavaShape(num_kv_heads=2),
    "mistral-window": LlavaShape(text="mistral", window=8),
    "qwen2-siglip": LlavaShape(text="qwen2", tower="siglip", num_kv_heads=2, feature_layer=-1, strategy="full"),
}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def transformers_ids(folder: Path) -> list[list[int]]:
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    model = hf_model(folder).cuda()
    siglip = model.config.vision_config.model_type == "siglip_vision_model"
    processor: Any = (SiglipImageProcessorPil if siglip else CLIPImageProcessorPil).from_pretrained(folder)
    with LLM(str(folder), device="cpu", media_workers=0) as llm:
        expanded = [llm._front.inputs.process("x", llm._front.read_prompt(p), GREEDY).request for p in PROMPTS]
    answers: list[list[int]] = []
    for prompt, request in zip(PROMPTS, expanded, strict=True):
        inputs: dict[str, Any] = {"input_ids": torch.tensor([request.prompt_token_ids], device="cuda")}
        if not isinstance(prompt, str):
            pictures = prompt["multi_modal_data"]["image"]
            inputs["pixel_values"] = processor(pictures, return_tensors="pt")["pixel_values"].cuda()
        generated = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
        answers.append(generated[0, len(request.prompt_token_ids) :].tolist())
    return answers


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_ids_equal_transformers_on_the_device(tiny_llava: Callable[[LlavaShape], Path], name: str):
    folder = tiny_llava(SHAPES[name])
    expected = transformers_ids(folder)
    for settings in BUDGETS:
        with LLM(str(folder), **SMALL, **settings) as llm:
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in outputs] == expected, settings
            assert_idle(llm)


def test_bfloat16_runs_and_stays_close(tiny_llava: Callable[[LlavaShape], Path]):
    """Teacher-forced: the log-probabilities of a float32 answer, under bfloat16."""
    folder = tiny_llava(SHAPES["gqa"])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = []
    for dtype in ("float32", "bfloat16"):
        settings: Any = {**SMALL, "dtype": dtype}
        with LLM(str(folder), **settings) as llm:
            (output,) = llm.generate(asked(4, text="Describe every colour."), params, use_tqdm=False)
            assert output.prompt_logprobs is not None
            entries = [entry for entry in output.prompt_logprobs if entry is not None]
            scored.append(torch.tensor([next(iter(entry.values())).logprob for entry in entries]))
    assert (scored[0] - scored[1]).abs().max() < 0.2


def test_memory_plan_is_kept(tiny_llava: Callable[[LlavaShape], Path]):
    """A model of several GB with random weights: the run stays below what the plan set aside."""
    folder = tiny_llava(SHAPES["gqa"])
    overrides = {
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
        }
    }
    torch.cuda.empty_cache()
    with LLM(str(folder), load_format="dummy", hf_overrides=overrides, gpu_memory_utilization=0.6) as llm:
        plan = llm.memory_plan
        assert plan.weight_bytes + plan.kv_bytes + plan.feature_bytes + plan.peak_step_bytes <= 0.6 * plan.total_bytes
        assert plan.kv_bytes > 0.3 * plan.total_bytes
        torch.cuda.reset_peak_memory_stats()
        llm.generate([asked(i) for i in range(64)], SamplingParams(max_tokens=32, ignore_eos=True), use_tqdm=False)
        assert torch.cuda.max_memory_allocated() <= plan.weight_bytes + plan.kv_bytes + plan.feature_bytes + (
            plan.peak_step_bytes
        )


def test_sampling_noise_is_the_same_on_every_device():
    keys = torch.from_numpy(_row_key([0, 1, 2**40] * 2, [0] * 3 + [7] * 3))[:, None]
    ids = torch.arange(1000)[None]
    torch.testing.assert_close(_gumbel(keys.cuda(), ids.cuda()).cpu(), _gumbel(keys, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_lens", [(1, 1, 1), (5, 1, 9), (9,)], ids=str)
def test_paged_attention_on_the_device_equals_the_cpu(query_lens: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    context_lens = tuple(length + 4 * i for i, length in enumerate(query_lens))
    block_size, columns = 4, 8
    num_tokens, num_blocks = sum(query_lens), len(query_lens) * columns + 1
    q, k, v = (torch.randn(num_tokens, heads, 16, generator=generator) for heads in (4, 2, 2))
    cache = LayerCache(*(torch.randn(num_blocks, block_size, 2, 16, generator=generator) for _ in range(2)))
    tables = torch.arange(1, num_blocks).view(len(query_lens), columns).int()
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(c - n, c) for n, c in zip(query_lens, context_lens, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(query_lens)), torch.tensor(query_lens))
    slots = tables[rows, positions // block_size].long() * block_size + positions % block_size

    def run(device: str) -> torch.Tensor:
        inputs = AttentionInputs(
            query_start_B1=starts.to(device),
            context_lens_B=torch.tensor(context_lens, dtype=torch.int32, device=device),
            block_tables_BL=tables.to(device),
            slot_mapping_T=slots.to(device),
            query_lens=query_lens,
            context_lens=context_lens,
        )
        here = LayerCache(cache.key.clone().to(device), cache.value.clone().to(device))
        reference.write_kv(k.to(device), v.to(device), here, inputs.slot_mapping_T)
        return reference.paged_attention(q.to(device), k.to(device), v.to(device), here, inputs, 0.25).cpu()

    torch.testing.assert_close(run("cuda"), run("cpu"), rtol=1e-4, atol=1e-5)
