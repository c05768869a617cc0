"""Qwen2-VL through ``LLM``: what its own positions and picture sizes could break on the road from prompt to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsin import LLM, BeamSearchParams, MediaError, RequestError, SamplingParams
from opsin.engine.build import _CPU_MEASURED_SIDE, fill_budget
from opsin.media.ops import make_tiles
from opsin.models.qwen2_vl.rule import Qwen2VLRule
from tests.engine.conftest import assert_idle, hf_model, picture
from tests.factories.qwen2_vl import IMAGE, Qwen2VLShape, hf_inputs, write_qwen2_vl

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def asked(*sizes: tuple[int, int], text: str = "What is this?") -> Any:
    """A prompt about one picture per size. Any, since tests also take it apart."""
    images = [picture(width * height + i, width, height) for i, (width, height) in enumerate(sizes)]
    return {"prompt": f"USER: {IMAGE * len(sizes)}\n{text} ASSISTANT:", "multi_modal_data": {"image": images}}


PROMPTS: list[Any] = [
    asked((90, 70)),
    asked((200, 33), (40, 60)),
    "Only text here.",
    asked((90, 70), text="Describe the colours of everything that you can see, at length, please."),
    asked((30, 30), (30, 30), (33, 200)),
    asked((640, 480)),
]


def ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def hf_prompt(folder: Path, prompt: Any) -> dict[str, torch.Tensor]:
    if isinstance(prompt, str):
        return hf_inputs(folder, prompt)
    return hf_inputs(folder, prompt["prompt"], prompt["multi_modal_data"]["image"])


@pytest.fixture(scope="module", params=["2", "2.5"])
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_vl(tmp_path_factory.mktemp("qwen"), Qwen2VLShape(version=request.param))


@pytest.fixture(scope="module")
def expected(qwen: Path) -> list[list[int]]:
    """Greedy ids of transformers for ``PROMPTS``."""
    model = hf_model(qwen)
    answers: list[list[int]] = []
    for prompt in PROMPTS:
        inputs = hf_prompt(qwen, prompt)
        generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        answers.append(generated[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.fixture(scope="module")
def make_qwen(qwen: Path) -> Iterator[Callable[..., LLM]]:
    made: dict[str, LLM] = {}

    def make(**settings: Any) -> LLM:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = LLM(str(qwen), media_workers=0, **settings)
        return made[key]

    yield make
    for llm in made.values():
        llm.shutdown()


@pytest.fixture
def llm(make_qwen: Callable[..., LLM]) -> Iterator[LLM]:
    engine = make_qwen()
    yield engine
    assert_idle(engine)


def test_qwen2_vl_generate_equals_transformers_batched_and_alone(llm: LLM, expected: list[list[int]], qwen: Path):
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert ids(outputs) == expected
    assert [ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in PROMPTS] == expected
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        assert output.prompt_token_ids == hf_prompt(qwen, prompt)["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7, "pipeline_depth": 2},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 40, "block_size": 4, "pipeline_depth": 2},
        {"max_num_batched_patches": 1, "vision_cache_gb": 2e-5, "pixel_buffer_gb": 1e-6},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_qwen2_vl_generate_under_any_budget_gives_the_same_tokens(
    make_qwen: Callable[..., LLM], expected: list[list[int]], settings: dict[str, Any]
):
    llm = make_qwen(**settings)
    for _ in range(2):  # the second time with whatever the first has cached
        assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert_idle(llm)
    if "num_gpu_blocks_override" in settings:
        assert llm.stats()["num_preemptions_total"] > 0


def test_qwen2_vl_shared_prefix_is_hit_and_continues_at_its_own_positions(
    make_qwen: Callable[..., LLM], expected: list[list[int]]
):
    """Both prompts begin with the same wide picture, whose positions run slower than its tokens."""
    llm = make_qwen(block_size=4)
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    (second,) = llm.generate(PROMPTS[3], GREEDY, use_tqdm=False)
    assert second.num_cached_tokens > 20
    assert second.outputs[0].token_ids == expected[3]


def test_qwen2_vl_beam_search_equals_transformers(llm: LLM, qwen: Path):
    (found,) = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
    truth = hf_model(qwen).generate(
        **hf_prompt(qwen, PROMPTS[0]),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    assert [sequence.tokens for sequence in found.sequences] == truth.tolist()


def test_qwen2_vl_embeddings_with_grids_equal_the_pictures(llm: LLM, expected: list[list[int]]):
    model: Any = llm._front.core.executor._runner.model  # type: ignore[attr-defined]
    processed = llm._front.inputs.process("probe", llm._front.read_prompt(PROMPTS[1]), GREEDY)
    layouts = [item.layout for item in processed.request.media]
    tiles = []
    for source, layout in zip(processed.sources, layouts, strict=True):
        pixels = np.empty(layout.plan.num_bytes, np.uint8)
        make_tiles(source.decode(), layout.plan, pixels)  # type: ignore[union-attr]
        tiles.append([torch.from_numpy(pixels).view(*layout.plan.tile_sizes[0], 3)])
    with torch.inference_mode():
        features = model.encode(tiles, layouts)
    grids = torch.tensor([layout.numbers for layout in layouts])
    parts = list(features.split([layout.num_features for layout in layouts]))
    for given in (features, parts):
        prompt = PROMPTS[1] | {"multi_modal_data": {"image": {"image_embeds": given, "image_grid_thw": grids}}}
        assert ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] == expected[1]
    with pytest.raises(RequestError, match="image_grid_thw"):
        llm.generate(PROMPTS[1] | {"multi_modal_data": {"image": parts}}, GREEDY, use_tqdm=False)


def test_qwen2_vl_expanded_token_ids_equal_the_text(llm: LLM, expected: list[list[int]], qwen: Path):
    token_ids = hf_prompt(qwen, PROMPTS[1])["input_ids"][0].tolist()
    prompt: Any = {"prompt_token_ids": token_ids, "multi_modal_data": PROMPTS[1]["multi_modal_data"]}
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == expected[1]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"])
def test_qwen2_vl_chat_puts_tags_around_the_picture(llm: LLM, template: str | None):
    """Also under a template that takes content as text, and never around what users type."""
    content: Any = [
        {"type": "image_pil", "image_pil": picture(1, 64, 32)},
        {"type": "text", "text": "Is <|image_pad|> a word?"},
    ]
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, chat_template=template, use_tqdm=False)
    tokenizer: Any = llm._front.inputs.tokenizer
    start, pad, end = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    )
    prompt = output.prompt_token_ids
    at = prompt.index(start)
    assert prompt[at : at + 10] == [start, *[pad] * 8, end]
    assert prompt.count(pad) == 8


def test_qwen2_vl_options_per_request_change_the_picture_s_tokens(llm: LLM):
    prompt = asked((320, 320))
    most = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    few = llm.generate(prompt | {"mm_processor_kwargs": {"max_pixels": 4 * 16 * 16}}, GREEDY, use_tqdm=False)[0]
    assert len(most.prompt_token_ids) - len(few.prompt_token_ids) == 36 - 4


def test_qwen2_vl_bad_pictures_fail_alone(llm: LLM, expected: list[list[int]]):
    video: Any = {"prompt": "x", "multi_modal_data": {"video": [picture(1)]}}
    results = llm.generate([asked((900, 3)), PROMPTS[0], video], GREEDY, use_tqdm=False, return_exceptions=True)
    assert isinstance(results[0], MediaError)
    assert "200 times" in str(results[0])
    assert isinstance(results[2], RequestError)
    assert ids([results[1]]) == [expected[0]]


def test_fill_budget_measures_what_a_cpu_can_run_in_time():
    """Of 1024 x 1024 pixels a checkpoint of the hub would make 5,476 patches, of which a CPU takes minutes."""

    class Tokenizer:
        def convert_tokens_to_ids(self, token: str) -> int:
            return 7

    rule = Qwen2VLRule.from_hf({"image_token_id": 7}, {"min_pixels": 3136, "max_pixels": 12845056}, Tokenizer())
    assert [layout.num_patches for layout in fill_budget(rule, 4096, _CPU_MEASURED_SIDE, {})] == [1024] * 4
    assert [layout.num_patches for layout in fill_budget(rule, 500, _CPU_MEASURED_SIDE, {})] == [1024]
