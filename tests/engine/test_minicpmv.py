"""MiniCPM-V through ``LLM``, against what its reference code made of the same checkpoints and prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from opsin import LLM, MediaError, RequestError, SamplingParams
from opsin.media.ops import make_frames
from opsin.runner.tower import cut_tiles
from tests.engine.conftest import assert_idle, engines_over, everybody_let_in
from tests.factories import minicpmv as factory
from tests.factories.minicpmv import IMAGE, Case, picture

pytestmark = factory.needs_recorded_pillow

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


class Served(NamedTuple):
    """A checkpoint, and what is recorded of it by name."""

    folder: Path
    cases: dict[str, Case]

    @property
    def prompts(self) -> list[Any]:
        return [case.prompt for case in self.cases.values()]


@pytest.fixture(scope="module", params=factory.SHAPES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    name = request.param
    folder = factory.write_minicpmv(tmp_path_factory.mktemp(name), factory.SHAPES[name])
    return Served(folder, {case.case: case for case in factory.recorded_cases(name)})


@pytest.fixture(scope="module")
def make_llm(served: Served) -> Iterator[Callable[..., LLM]]:
    """In place of the room's own, and so beneath its ``llm`` too."""
    with engines_over(served.folder) as make:
        yield make


def ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def expected(cases: list[Case]) -> list[list[int]]:
    return [case.greedy for case in cases]


def test_generate_equals_the_reference_batched_and_alone(llm: LLM, served: Served):
    cases = list(served.cases.values())
    outputs = llm.generate(served.prompts, GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [case.ids for case in cases]
    assert ids(outputs) == expected(cases)
    assert [ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in served.prompts] == expected(cases)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7, "pipeline_depth": 2},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 60, "block_size": 4, "pipeline_depth": 2, "max_model_len": 200},
        {"max_num_batched_patches": 1, "vision_cache_gb": 1e-4, "pixel_buffer_gb": 1e-6},
    ],
    ids=["chunked", "no-prefix-cache", "preempted", "picture-by-picture"],
)
def test_generate_under_any_budget_gives_the_same_tokens(
    make_llm: Callable[..., LLM], served: Served, settings: dict[str, Any]
):
    llm = make_llm(**settings)
    with everybody_let_in():
        for _ in range(2):  # the second time with whatever the first has cached
            assert ids(llm.generate(served.prompts, GREEDY, use_tqdm=False)) == expected(list(served.cases.values()))
    assert_idle(llm)
    if "num_gpu_blocks_override" in settings:
        assert llm.stats()["num_preemptions_total"] > 0


def test_shared_prefix_is_hit_to_its_end_and_another_picture_s_is_not(make_llm: Callable[..., LLM], served: Served):
    """The same two pictures with another number of slices differ from their first tokens on."""
    llm = make_llm(block_size=4)
    case = served.cases["two"]
    llm.generate(case.prompt, GREEDY, use_tqdm=False)
    other = case.prompt | {"multi_modal_data": {"image": [picture(5, 90, 70), case.images[1]]}}
    missed, hit = llm.generate([other, case.prompt], GREEDY, use_tqdm=False)
    assert hit.num_cached_tokens == (len(case.ids) - 1) // 4 * 4
    assert ids([hit]) == [case.greedy]
    text = len(list(takewhile(lambda token: token != case_token(llm, "<unk>"), case.ids)))
    assert missed.num_cached_tokens == text // 4 * 4
    assert ids([missed]) != [case.greedy]


def case_token(llm: LLM, text: str) -> int:
    return llm.get_tokenizer().convert_tokens_to_ids(text)


def test_max_slice_nums_of_the_engine_is_that_of_its_requests_unless_they_bring_their_own(
    make_llm: Callable[..., LLM], served: Served
):
    llm = make_llm(mm_processor_kwargs={"max_slice_nums": 3})
    few, one = served.cases["few slices"], served.cases["one slice"]
    prompts = [few.prompt | {"mm_processor_kwargs": {}}, one.prompt]
    assert ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == [few.greedy, one.greedy]


def encoded(llm: LLM, prompt: Any) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Features of each of a prompt's pictures, computed by hand, and (width, height) of each."""
    model: Any = llm._front.engine.core.executor._runner.model  # type: ignore[attr-defined]
    processed = llm._front.inputs.process("probe", llm._front.read_prompt(prompt), GREEDY)
    layouts = [item.layout for item in processed.request.media]
    tiles: list[list[torch.Tensor]] = []
    for image, layout in zip(prompt["multi_modal_data"]["image"], layouts, strict=True):
        pixels = np.empty(layout.plan.num_bytes, np.uint8)
        make_frames([image], layout.plan, pixels)
        tiles.append(cut_tiles(torch.from_numpy(pixels), layout))
    with torch.inference_mode():
        features = model.encode(tiles, layouts)
    sizes = [(layout.plan.width, layout.plan.height) for layout in layouts]
    return list(features.split([layout.num_features for layout in layouts])), sizes


@pytest.mark.parametrize("key", ["image_sizes", "image_size_list"])
def test_embeddings_equal_the_pictures(llm: LLM, served: Served, key: str):
    two, few, chat = (served.cases[name] for name in ("two", "few slices", "chat"))
    parts, sizes = encoded(llm, two.prompt)
    (single,), size = encoded(llm, chat.prompt)
    given: list[Any] = [
        (two, {"image_embeds": parts, key: sizes}),
        (two, {"image_embeds": [part[None] for part in parts], key: torch.tensor(sizes)}),
        (chat, {"image_embeds": single[None], key: size}),  # (pictures, features, width), as vLLM's page has it
        (chat, {"image_embeds": single, key: size}),
        (few, {"image_embeds": encoded(llm, few.prompt)[0], key: sizes}),
    ]
    prompts = [case.prompt | {"multi_modal_data": {"image": data}} for case, data in given]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [case.ids for case, _ in given]
    assert ids(outputs) == [case.greedy for case, _ in given]
    for wrong, words in (
        (parts, "image_size_list"),
        ({"image_embeds": [parts[0][:-1], parts[1]], key: sizes}, "this model makes 4 of it"),
        ({"image_embeds": parts, key: sizes[:1]}, "sizes or grids of 1"),
    ):
        with pytest.raises(ValueError, match=words):
            llm.generate(two.prompt | {"multi_modal_data": {"image": wrong}}, GREEDY, use_tqdm=False)


def test_expanded_token_ids_equal_the_text(llm: LLM, served: Served):
    case = served.cases["three"]
    prompt: Any = {"prompt_token_ids": case.ids, "multi_modal_data": {"image": case.images}}
    assert ids(llm.generate(prompt, GREEDY, use_tqdm=False)) == [case.greedy]


def test_chat_equals_the_reference(llm: LLM, served: Served):
    case = served.cases["chat"]
    content: Any = [{"type": "text", "text": "What is this?"}, {"type": "image_pil", "image_pil": case.images[0]}]
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == case.ids
    assert ids([output]) == [case.greedy]


def test_chat_takes_control_tokens_from_the_picture_alone(llm: LLM, served: Served):
    """What users type stays text: placeholders, tags, the token that takes features."""
    typed = f"Is {IMAGE} or (<video>./</video>) or {''.join(factory.TOKENS)}<unk> a word?"
    content: Any = [{"type": "image_pil", "image_pil": picture(1, 64, 48)}, {"type": "text", "text": typed}]
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
    (plain,) = llm.chat([{"role": "user", "content": [content[0], "Is this a word?"]}], GREEDY, use_tqdm=False)
    controls = {case_token(llm, token) for token in (*factory.TOKENS, "<unk>")}
    counts = [sum(token in controls for token in found.prompt_token_ids) for found in (output, plain)]
    assert counts[0] == counts[1] > factory.QUERIES


def test_pictures_beside_a_video_keep_their_numbers(llm: LLM, served: Served):
    """The video counts among videos alone, and its frames take no slices."""
    frames = served.cases["video"].images
    text = f"{IMAGE} then {factory.VIDEO} then {IMAGE}"
    data = {"image": [picture(1, 64, 48), picture(2, 30, 30)], "video": [frames]}
    options = {"use_image_id": True}
    prompt: Any = {"prompt": text, "multi_modal_data": data, "mm_processor_kwargs": options}
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    written = llm.get_tokenizer().decode(output.prompt_token_ids).replace("<unk>" * 4, ".")
    whole, row = "<image>.</image>", "<slice>.</slice>" * 2
    sliced = f"<image_id>0</image_id>{whole}{row}\n{row}"
    assert written == f"{sliced} then {whole * 4} then <image_id>1</image_id>{whole}"


def test_bad_requests_fail_alone(llm: LLM, served: Served):
    case = served.cases["two"]
    torn = case.prompt | {"multi_modal_data": {"image": [case.images[0], b"not a picture"]}}
    line = case.prompt | {"multi_modal_data": {"image": [case.images[0], picture(0, 1, 40000)]}}
    option = case.prompt | {"mm_processor_kwargs": {"max_slice_nums": 0}}
    lacking = case.prompt | {"multi_modal_data": {"image": case.images[:1]}}
    prompts: list[Any] = [case.prompt, torn, line, option, lacking]
    answer, *errors = llm.generate(prompts, GREEDY, use_tqdm=False, return_exceptions=True)
    assert ids([answer]) == [case.greedy]
    kinds: list[tuple[type[Exception], str]] = [
        (MediaError, ""),
        (MediaError, "too narrow"),
        (RequestError, "max_slice_nums is 0"),
        (RequestError, "2 image"),
    ]
    for error, (kind, words) in zip(errors, kinds, strict=True):
        assert type(error) is kind
        assert words in str(error)


def test_checkpoint_with_code_of_its_own_loads_without_it_and_without_a_warning(
    served: Served, caplog: pytest.LogCaptureFixture
):
    """There is no such code in the folder; ``trust_remote_code`` is accepted, and changes nothing."""
    assert not list(served.folder.glob("*.py"))
    with caplog.at_level(logging.WARNING), engines_over(served.folder) as make:
        llm = make(trust_remote_code=True)
        case = served.cases["text"]
        assert ids(llm.generate(case.text, GREEDY, use_tqdm=False)) == [case.greedy]
    assert caplog.messages == []
