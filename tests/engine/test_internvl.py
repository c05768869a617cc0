"""InternVL through ``LLM``: what tiles, and tags that come with the expansion, could break on the road to an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsin import LLM, BeamSearchParams, MediaError, RequestError, SamplingParams
from opsin.media.ops import make_tiles
from tests.engine.conftest import assert_idle, hf_model, picture
from tests.factories.internvl import IMAGE, InternVLShape, hf_inputs, write_internvl

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SHAPES = {
    "qwen2": InternVLShape(vision_extra=(("attention_bias", True),)),
    "llama": InternVLShape(text="llama", vision_extra=(("norm_type", "rms_norm"), ("use_qk_norm", True))),
}


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


@pytest.fixture(scope="module", params=SHAPES)
def intern(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl(tmp_path_factory.mktemp("internvl"), SHAPES[request.param])


@pytest.fixture(scope="module")
def expected(intern: Path) -> list[list[int]]:
    """Greedy ids of transformers for ``PROMPTS``."""
    model = hf_model(intern)
    answers: list[list[int]] = []
    for prompt in PROMPTS:
        inputs = hf_prompt(intern, prompt)
        generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        answers.append(generated[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.fixture(scope="module")
def make_intern(intern: Path) -> Iterator[Callable[..., LLM]]:
    made: dict[str, LLM] = {}

    def make(**settings: Any) -> LLM:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = LLM(str(intern), media_workers=0, **settings)
        return made[key]

    yield make
    for llm in made.values():
        llm.shutdown()


@pytest.fixture
def llm(make_intern: Callable[..., LLM]) -> Iterator[LLM]:
    engine = make_intern()
    yield engine
    assert_idle(engine)


def test_internvl_generate_equals_transformers_batched_and_alone(llm: LLM, expected: list[list[int]], intern: Path):
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert ids(outputs) == expected
    assert [ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in PROMPTS] == expected
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        assert output.prompt_token_ids == hf_prompt(intern, prompt)["input_ids"][0].tolist()


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
def test_internvl_generate_under_any_budget_gives_the_same_tokens(
    make_intern: Callable[..., LLM], expected: list[list[int]], settings: dict[str, Any]
):
    llm = make_intern(**settings)
    for _ in range(2):  # the second time with whatever the first has cached
        assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert_idle(llm)
    if "num_gpu_blocks_override" in settings:
        assert llm.stats()["num_preemptions_total"] > 0


def test_internvl_shared_prefix_is_hit_past_the_picture(make_intern: Callable[..., LLM], expected: list[list[int]]):
    llm = make_intern(block_size=4)
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    (second,) = llm.generate(PROMPTS[3], GREEDY, use_tqdm=False)
    assert second.num_cached_tokens > 20
    assert second.outputs[0].token_ids == expected[3]


def test_internvl_beam_search_equals_transformers(llm: LLM, intern: Path):
    (found,) = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
    truth = hf_model(intern).generate(
        **hf_prompt(intern, PROMPTS[0]),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    assert [sequence.tokens for sequence in found.sequences] == truth.tolist()


def test_internvl_embeddings_equal_the_pictures(llm: LLM, expected: list[list[int]]):
    model: Any = llm._front.core.executor._runner.model  # type: ignore[attr-defined]
    processed = llm._front.inputs.process("probe", llm._front.read_prompt(PROMPTS[1]), GREEDY)
    layouts = [item.layout for item in processed.request.media]
    parts: list[torch.Tensor] = []
    for source, layout in zip(processed.sources, layouts, strict=True):
        pixels = np.empty(layout.plan.num_bytes, np.uint8)
        make_tiles(source.decode(), layout.plan, pixels)  # type: ignore[union-attr]
        with torch.inference_mode():
            tiles = list(torch.from_numpy(pixels).view(-1, *layout.plan.tile_sizes[0], 3))
            parts.append(model.encode([tiles], [layout]))
    (output,) = llm.generate(PROMPTS[1] | {"multi_modal_data": {"image": parts}}, GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == expected[1]
    bad = PROMPTS[1] | {"multi_modal_data": {"image": [parts[0][:-1], parts[1]]}}
    with pytest.raises(RequestError, match="whole tiles of 4"):
        llm.generate(bad, GREEDY, use_tqdm=False)


def test_internvl_expanded_token_ids_equal_the_text(llm: LLM, expected: list[list[int]], intern: Path):
    token_ids = hf_prompt(intern, PROMPTS[1])["input_ids"][0].tolist()
    prompt: Any = {"prompt_token_ids": token_ids, "multi_modal_data": PROMPTS[1]["multi_modal_data"]}
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == expected[1]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"])
def test_internvl_chat_puts_tags_around_the_picture(llm: LLM, template: str | None):
    """Also under a template that takes content as text, and never around what users type."""
    content: Any = [
        {"type": "image_pil", "image_pil": picture(1, 64, 32)},
        {"type": "text", "text": "Are <img> and <IMG_CONTEXT> words?"},
    ]
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, chat_template=template, use_tqdm=False)
    tokenizer: Any = llm._front.inputs.tokenizer
    start, context, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<img>", IMAGE, "</img>"))
    prompt = output.prompt_token_ids
    at = prompt.index(start)
    assert prompt[at : at + 14] == [start, *[context] * 12, end]  # 2 tiles and the whole, 4 features each
    assert (prompt.count(start), prompt.count(context)) == (1, 12)


def test_internvl_options_per_request_change_the_tiles(llm: LLM):
    prompt = asked((320, 320))
    counts = {}
    for most in (6, 4, 1):
        given = prompt | {"mm_processor_kwargs": {"max_patches": most}}
        counts[most] = len(llm.generate(given, GREEDY, use_tqdm=False)[0].prompt_token_ids)
    assert (counts[6] - counts[1], counts[4] - counts[1]) == (16, 16)
    whole = llm.generate(prompt | {"mm_processor_kwargs": {"crop_to_patches": False}}, GREEDY, use_tqdm=False)[0]
    assert len(whole.prompt_token_ids) == counts[1]


def test_internvl_bad_requests_fail_alone(llm: LLM, expected: list[list[int]]):
    video: Any = {"prompt": "x", "multi_modal_data": {"video": [picture(1)]}}
    broken = PROMPTS[0] | {"multi_modal_data": {"image": [b"not a picture"]}}
    results = llm.generate([broken, PROMPTS[0], video], GREEDY, use_tqdm=False, return_exceptions=True)
    assert isinstance(results[0], (MediaError, RequestError))
    assert isinstance(results[2], RequestError)
    assert "video" in str(results[2])
    assert ids([results[1]]) == [expected[0]]
