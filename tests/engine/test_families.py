"""Every family through ``LLM``: what its pictures could break on the road from prompt to answer.

transformers is the oracle. ``tests/factories/families.py`` has a row for each family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from opsin import LLM, BeamSearchParams, MediaError, RequestError, SamplingParams
from opsin.media.ops import make_tiles
from opsin.types import MediaLayout
from tests.engine.conftest import assert_idle, engines_over, everybody_let_in, picture
from tests.factories.families import FAMILIES
from tests.factories.family import Family, Size

MAX_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)


def ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


class Served(NamedTuple):
    """A family's checkpoint, and transformers' model and tokenizer of it."""

    family: Family
    folder: Path
    model: Any
    tokenizer: Any
    prompts: list[Any]

    def asked(self, *sizes: Size, text: str = "What is this?") -> Any:
        """A prompt about one picture per size. Any, since tests also take it apart."""
        images = [picture(width * height + i, width, height) for i, (width, height) in enumerate(sizes)]
        signs = self.family.signs(len(sizes))
        return {"prompt": f"USER: {signs}\n{text} ASSISTANT:", "multi_modal_data": {"image": images}}

    def inputs(self, prompt: Any, **options: Any) -> dict[str, torch.Tensor]:
        if isinstance(prompt, str):
            return self.family.hf_inputs(self.folder, prompt)
        return self.family.hf_inputs(self.folder, prompt["prompt"], prompt["multi_modal_data"]["image"], **options)

    def generate(self, inputs: dict[str, torch.Tensor], **settings: Any) -> list[list[int]]:
        """Prompts and transformers' answers."""
        return self.model.generate(**inputs, do_sample=False, eos_token_id=None, **settings).tolist()


CASES = [pytest.param((row, name), id=f"{row.name}-{name}") for row in FAMILIES for name in row.served]


@pytest.fixture(scope="module", params=CASES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    family, name = request.param
    folder = family.write(tmp_path_factory.mktemp(family.name), family.shapes[name])
    served = Served(
        family, folder, family.load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False), []
    )
    at_length = "Describe the colours of everything that you can see, at length, please."
    for i, sizes in enumerate(family.asked):
        text = {"text": at_length} if i == 3 else {}
        served.prompts.append(served.asked(*sizes, **text) if sizes else "Only text here.")
    return served


@pytest.fixture(scope="module")
def prompt_ids(served: Served) -> list[list[int]]:
    return [served.inputs(prompt)["input_ids"][0].tolist() for prompt in served.prompts]


@pytest.fixture(scope="module")
def expected(served: Served, prompt_ids: list[list[int]]) -> list[list[int]]:
    """Greedy ids of transformers for all prompts."""
    outputs = [served.generate(served.inputs(prompt), max_new_tokens=MAX_TOKENS)[0] for prompt in served.prompts]
    return [output[len(prompt) :] for output, prompt in zip(outputs, prompt_ids, strict=True)]


@pytest.fixture(scope="module")
def make_llm(served: Served) -> Iterator[Callable[..., LLM]]:
    """In place of the room's own, and so beneath its ``llm`` too."""
    with engines_over(served.folder) as make:
        yield make


def test_generate_equals_transformers_batched_and_alone(
    llm: LLM, served: Served, prompt_ids: list[list[int]], expected: list[list[int]]
):
    outputs = llm.generate(served.prompts, GREEDY, use_tqdm=False)
    assert ids(outputs) == expected
    assert [output.prompt_token_ids for output in outputs] == prompt_ids
    assert [ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in served.prompts] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": None, "pipeline_depth": 2},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": None, "block_size": 4, "pipeline_depth": 2},
        {"max_num_batched_patches": 1, "vision_cache_gb": None, "pixel_buffer_gb": 1e-6},
    ],
    ids=["chunked", "no-prefix-cache", "preempted", "picture-by-picture"],
)
def test_generate_under_any_budget_gives_the_same_tokens(
    make_llm: Callable[..., LLM], served: Served, expected: list[list[int]], settings: dict[str, Any]
):
    scarce = "num_gpu_blocks_override" in settings
    family = served.family
    least = {
        "max_num_batched_tokens": family.least_step,
        "num_gpu_blocks_override": family.num_blocks,
        "vision_cache_gb": family.least_features_gb,
    }
    llm = make_llm(**settings | {name: value for name, value in least.items() if name in settings})
    with everybody_let_in():
        for _ in range(2):  # the second time with whatever the first has cached
            assert ids(llm.generate(served.prompts, GREEDY, use_tqdm=False)) == expected
    assert_idle(llm)
    if scarce:
        assert llm.stats()["num_preemptions_total"] > 0


def test_shared_prefix_is_hit_to_its_end_and_another_picture_s_is_not(
    make_llm: Callable[..., LLM], served: Served, prompt_ids: list[list[int]], expected: list[list[int]]
):
    """Both prompts begin with the same picture; another of its size shares only what stands before it."""
    llm = make_llm(block_size=4)
    first, same = served.prompts[0], served.prompts[3]
    llm.generate(first, GREEDY, use_tqdm=False)
    other = same | {"multi_modal_data": {"image": [picture(1, *served.family.asked[3][0])]}}
    missed, hit = llm.generate([other, same], GREEDY, use_tqdm=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids[0], prompt_ids[3], strict=False)))
    spans = llm._front.inputs.process("probe", llm._front.read_prompt(same), GREEDY).request.spans
    assert spans[-1].start + spans[-1].length <= shared
    assert hit.num_cached_tokens == (0 if served.family.is_prefix_lm else shared // 4 * 4)
    assert missed.num_cached_tokens == (0 if served.family.is_prefix_lm else spans[0].start // 4 * 4)
    assert hit.outputs[0].token_ids == expected[3]


def test_beam_search_equals_transformers(llm: LLM, served: Served):
    (found,) = llm.beam_search(served.prompts[0], BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
    truth = served.generate(served.inputs(served.prompts[0]), num_beams=3, num_return_sequences=3, max_new_tokens=6)
    assert [sequence.tokens for sequence in found.sequences] == truth


def encoded(llm: LLM, prompt: Any) -> tuple[list[torch.Tensor], list[MediaLayout]]:
    """Features of each of a prompt's pictures, computed by hand."""
    model: Any = llm._front.engine.core.executor._runner.model  # type: ignore[attr-defined]
    processed = llm._front.inputs.process("probe", llm._front.read_prompt(prompt), GREEDY)
    layouts = [item.layout for item in processed.request.media]
    tiles: list[list[torch.Tensor]] = []
    for source, layout in zip(processed.sources, layouts, strict=True):
        pixels = np.empty(layout.plan.num_bytes, np.uint8)
        make_tiles(source.decode(), layout.plan, pixels)  # type: ignore[union-attr]
        tiles.append(list(torch.from_numpy(pixels).view(-1, *layout.plan.tile_sizes[0], 3)))
    with torch.inference_mode():
        features = model.encode(tiles, layouts)
    return list(features.split([layout.num_features for layout in layouts])), layouts


def test_embeddings_equal_the_pictures(llm: LLM, served: Served, expected: list[list[int]]):
    parts, layouts = encoded(llm, served.prompts[1])
    for given in served.family.embeddings(parts, layouts):
        prompt = served.prompts[1] | {"multi_modal_data": {"image": given}}
        assert ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] == expected[1]
    given, words = served.family.bad_embeddings(parts, layouts)
    with pytest.raises(RequestError, match=words):
        llm.generate(served.prompts[1] | {"multi_modal_data": {"image": given}}, GREEDY, use_tqdm=False)


def test_expanded_token_ids_equal_the_text(
    llm: LLM, served: Served, prompt_ids: list[list[int]], expected: list[list[int]]
):
    prompt: Any = {"prompt_token_ids": prompt_ids[1], "multi_modal_data": served.prompts[1]["multi_modal_data"]}
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == expected[1]


def test_chat_equals_transformers(llm: LLM, served: Served):
    image, text = picture(1, 64, 20), {"type": "text", "text": "What is this?"}
    content: Any = [{"type": "image_pil", "image_pil": image}, text]
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
    message = {"role": "user", "content": [{"type": "image"}, text]}
    rendered = served.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    inputs = served.family.hf_inputs(served.folder, rendered, [image])
    assert [output.prompt_token_ids + output.outputs[0].token_ids] == served.generate(inputs, max_new_tokens=MAX_TOKENS)


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"], ids=["own", "plain"]
)
def test_chat_takes_control_tokens_from_the_picture_alone(llm: LLM, served: Served, template: str | None):
    """Also under a template that takes content as text; what users type stays text."""
    image = picture(1, 64, 32)
    controls = served.family.pictures_inputs(served.folder, [image])["input_ids"][0].tolist()
    opening, closing = served.tokenizer.encode(""), served.tokenizer.encode(served.family.closing)
    if controls[: len(opening)] == opening:  # without what begins and ends every prompt
        controls = controls[len(opening) :]
    controls = controls[: len(controls) - len(closing) + len(opening)]
    special = set(controls) & set(served.tokenizer.added_tokens_decoder)  # between them may be newlines
    typed = " and ".join(served.tokenizer.convert_ids_to_tokens(sorted(special)))
    content: Any = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": f"Are {typed} words?"}]
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, chat_template=template, use_tqdm=False)
    prompt = output.prompt_token_ids
    if prompt[: len(opening)] == opening:
        prompt = prompt[len(opening) :]
    at = prompt.index(controls[0])
    assert prompt[at : at + len(controls)] == controls
    assert [token for token in prompt if token in special] == [token for token in controls if token in special]


def test_options_per_request_equal_transformers_own(llm: LLM, served: Served):
    prompt = served.asked((320, 320))
    for ours, theirs in served.family.options:
        (output,) = llm.generate(prompt | {"mm_processor_kwargs": ours}, GREEDY, use_tqdm=False)
        truth = served.generate(served.inputs(prompt, **theirs), max_new_tokens=MAX_TOKENS)
        assert [output.prompt_token_ids + output.outputs[0].token_ids] == truth, ours


def test_bad_requests_fail_alone(llm: LLM, served: Served, expected: list[list[int]]):
    video: Any = {"prompt": "x", "multi_modal_data": {"video": [picture(1)]}}
    torn = served.prompts[0] | {"multi_modal_data": {"image": [b"not a picture"]}}
    prompts: list[Any] = [video, served.prompts[0], torn]
    errors: list[tuple[type[Exception], str]] = [(RequestError, "video"), (MediaError, "")]
    for size, options, error, words in served.family.refused:
        prompts.append(served.asked(size) | {"mm_processor_kwargs": options})
        errors.append((error, words))
    first, answer, *others = llm.generate(prompts, GREEDY, use_tqdm=False, return_exceptions=True)
    for result, (error, words) in zip([first, *others], errors, strict=True):
        assert type(result) is error
        assert words in str(result)
    assert ids([answer]) == [expected[0]]
