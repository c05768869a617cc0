"""LLaVA-NeXT through ``LLM``: what pictures of many tiles could break on the road from prompt to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaNextProcessor

from opsin import LLM, BeamSearchParams, MediaError, RequestError, SamplingParams
from opsin.media.ops import make_tiles
from tests.engine.conftest import assert_idle, hf_model, picture
from tests.factories.llava_next import LlavaNextShape, hf_inputs, write_llava_next

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def asked(*sizes: tuple[int, int], text: str = "What is this?") -> Any:
    """A prompt about one picture per size. Any, since tests also take it apart."""
    images = [picture(width * height + i, width, height) for i, (width, height) in enumerate(sizes)]
    signs = "<image>" * len(sizes)
    return {"prompt": f"USER: {signs}\n{text} ASSISTANT:", "multi_modal_data": {"image": images}}


PROMPTS: list[Any] = [
    asked((90, 60)),
    asked((200, 33), (40, 100)),
    "Only text here.",
    asked((90, 60), text="Describe the colours of everything that you can see, at length, please."),
    asked((30, 30), (30, 30), (900, 1)),
    asked((640, 480)),
]


def ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def hf_prompt(folder: Path, prompt: Any) -> dict[str, torch.Tensor]:
    if isinstance(prompt, str):
        return hf_inputs(folder, prompt, [])
    return hf_inputs(folder, prompt["prompt"], prompt["multi_modal_data"]["image"])


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_next(tmp_path_factory.mktemp("next"), LlavaNextShape(text=request.param, num_kv_heads=2))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """Greedy ids of transformers for ``PROMPTS``."""
    model = hf_model(folder)
    answers: list[list[int]] = []
    for prompt in PROMPTS:
        inputs = hf_prompt(folder, prompt)
        generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        answers.append(generated[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.fixture(scope="module")
def make_next(folder: Path) -> Iterator[Callable[..., LLM]]:
    made: dict[str, LLM] = {}

    def make(**settings: Any) -> LLM:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = LLM(str(folder), media_workers=0, **settings)
        return made[key]

    yield make
    for llm in made.values():
        llm.shutdown()


@pytest.fixture
def llm(make_next: Callable[..., LLM]) -> Iterator[LLM]:
    engine = make_next()
    yield engine
    assert_idle(engine)


def test_llava_next_generate_equals_transformers_batched_and_alone(llm: LLM, expected: list[list[int]], folder: Path):
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert ids(outputs) == expected
    assert [ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in PROMPTS] == expected
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        assert output.prompt_token_ids == hf_prompt(folder, prompt)["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7, "pipeline_depth": 2},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 70, "block_size": 4, "pipeline_depth": 2},
        {"max_num_batched_patches": 1, "vision_cache_gb": 2e-5, "pixel_buffer_gb": 1e-6},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_llava_next_generate_under_any_budget_gives_the_same_tokens(
    make_next: Callable[..., LLM], expected: list[list[int]], settings: dict[str, Any]
):
    llm = make_next(**settings)
    for _ in range(2):  # the second time with whatever the first has cached
        assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert_idle(llm)
    if "num_gpu_blocks_override" in settings:
        assert llm.stats()["num_preemptions_total"] > 0


def test_llava_next_shared_prefix_is_hit(make_next: Callable[..., LLM], expected: list[list[int]]):
    """Both prompts begin with the same picture; another of its size shares only what stands before it."""
    llm = make_next(block_size=4)
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    other = PROMPTS[3] | {"multi_modal_data": {"image": [picture(1, 90, 60)]}}
    unlike, same = llm.generate([other, PROMPTS[3]], GREEDY, use_tqdm=False)
    assert same.num_cached_tokens > 60
    assert unlike.num_cached_tokens < 16
    assert same.outputs[0].token_ids == expected[3]


def test_llava_next_beam_search_equals_transformers(llm: LLM, folder: Path):
    (found,) = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
    truth = hf_model(folder).generate(
        **hf_prompt(folder, PROMPTS[0]),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    assert [sequence.tokens for sequence in found.sequences] == truth.tolist()


def test_llava_next_embeddings_equal_the_pictures(llm: LLM, expected: list[list[int]]):
    """Features per picture, alone or with the sizes that they are counted against."""
    model: Any = llm._front.core.executor._runner.model  # type: ignore[attr-defined]
    processed = llm._front.inputs.process("probe", llm._front.read_prompt(PROMPTS[1]), GREEDY)
    layouts = [item.layout for item in processed.request.media]
    tiles = []
    for source, layout in zip(processed.sources, layouts, strict=True):
        pixels = np.empty(layout.plan.num_bytes, np.uint8)
        make_tiles(source.decode(), layout.plan, pixels)  # type: ignore[union-attr]
        tiles.append(list(torch.from_numpy(pixels).view(-1, *layout.plan.tile_sizes[0], 3)))
    with torch.inference_mode():
        features = model.encode(tiles, layouts)
    parts = list(features.split([layout.num_features for layout in layouts]))
    sizes = torch.tensor([(layout.plan.height, layout.plan.width) for layout in layouts])
    for given in (parts, {"image_embeds": parts}, {"image_embeds": parts, "image_sizes": sizes}):
        prompt = PROMPTS[1] | {"multi_modal_data": {"image": given}}
        assert ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] == expected[1]
    wrong = PROMPTS[1] | {"multi_modal_data": {"image": {"image_embeds": parts, "image_sizes": sizes.flip(0)}}}
    with pytest.raises(RequestError, match="newlines included"):
        llm.generate(wrong, GREEDY, use_tqdm=False)


def test_llava_next_expanded_token_ids_equal_the_text(llm: LLM, expected: list[list[int]], folder: Path):
    token_ids = hf_prompt(folder, PROMPTS[1])["input_ids"][0].tolist()
    prompt: Any = {"prompt_token_ids": token_ids, "multi_modal_data": PROMPTS[1]["multi_modal_data"]}
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == expected[1]


def test_llava_next_chat_expands_the_picture_as_transformers_does(llm: LLM, folder: Path):
    image = picture(1, 64, 20)
    content: Any = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": "What is this?"}]
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
    inputs = hf_inputs(folder, "USER: <image>\nWhat is this? ASSISTANT:", [image])
    generated = hf_model(folder).generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert output.prompt_token_ids + output.outputs[0].token_ids == generated[0].tolist()


def test_llava_next_options_per_request_change_the_picture(llm: LLM, folder: Path):
    prompt = asked((320, 100))
    options = {"resample": 0}
    (output,) = llm.generate(prompt | {"mm_processor_kwargs": options}, GREEDY, use_tqdm=False)
    model, inputs = hf_model(folder), hf_prompt(folder, prompt)
    pictures: Any = LlavaNextProcessor.from_pretrained(folder).image_processor
    inputs["pixel_values"] = pictures(prompt["multi_modal_data"]["image"], return_tensors="pt", **options).pixel_values
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert output.prompt_token_ids + output.outputs[0].token_ids == generated[0].tolist()


def test_llava_next_bad_requests_fail_alone(llm: LLM, expected: list[list[int]]):
    video: Any = {"prompt": "x", "multi_modal_data": {"video": [picture(1)]}}
    pinned: Any = PROMPTS[0] | {"mm_processor_kwargs": {"image_grid_pinpoints": [[32, 32]]}}
    torn: Any = asked((90, 60)) | {"multi_modal_data": {"image": [b"not a picture"]}}
    prompts = [video, PROMPTS[0], pinned, torn]
    results = llm.generate(prompts, GREEDY, use_tqdm=False, return_exceptions=True)
    assert [type(result) for result in (results[0], results[2])] == [RequestError, RequestError]
    assert isinstance(results[3], MediaError)
    assert ids([results[1]]) == [expected[0]]
