"""GLM-4.1V's and GLM-4.6V's videos through ``LLM``, held to transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from opsin import LLM, RequestError, SamplingParams
from tests.engine.conftest import assert_idle, engines_over, hf_model, picture
from tests.factories.glm4v import IMAGE, UNIT, VIDEO, Glm4vShape, hf_inputs, write_glm4v
from tests.media.clips import decoded, encode, frames

NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
TEXT = f"USER: {VIDEO}\nWhat happens? ASSISTANT:"


class Served(NamedTuple):
    folder: Path
    model: Any
    make: Callable[..., LLM]

    def expected(self, text: str, order: Sequence[str] = (), **media: Any) -> tuple[list[int], list[int], list[float]]:
        """Prompt ids, greedy tokens, and their log-probabilities, by transformers.

        Args:
            order: "image" and "video" as they come, of prompts with both.
        """
        inputs = hf_inputs(self.folder, text, **media)
        if order:
            inputs = as_pictures(inputs, order)
        prompt = inputs["input_ids"][0].tolist()
        with torch.inference_mode():
            made = self.model.generate(
                **inputs, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
        answer = made.sequences[0, len(prompt) :].tolist()
        logprobs = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(made.logits, answer, strict=True)]
        return prompt, answer, logprobs


def as_pictures(inputs: dict[str, torch.Tensor], order: Sequence[str]) -> dict[str, torch.Tensor]:
    """The same prompt, each step of a video a picture. Transformers takes pictures or videos, but not both at once: it
    looks for the features of each at the tokens of both."""
    waiting: dict[str, Iterator[tuple[list[int], torch.Tensor]]] = {}
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = inputs.pop(f"{kind}_grid_thw")
        waiting[kind] = zip(grids.tolist(), inputs.pop(key).split(grids.prod(1).tolist()), strict=True)
    items = [next(waiting[kind]) for kind in order]
    inputs["pixel_values"] = torch.cat([pixels for _, pixels in items])
    inputs["image_grid_thw"] = torch.tensor([[1, rows, cols] for (count, rows, cols), _ in items for _ in range(count)])
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"].clamp(max=1)
    return inputs


@pytest.fixture(scope="module", params=["4.1", "4.6"])
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    shape = Glm4vShape(version=request.param, max_pixels=24 * UNIT**2)
    folder = write_glm4v(tmp_path_factory.mktemp("glm4v"), shape)
    with engines_over(folder) as make:
        yield Served(folder, hf_model(folder), make)


@pytest.fixture
def llm(served: Served) -> Iterator[LLM]:
    engine = served.make(limit_mm_per_prompt={"image": 4, "video": 4})
    yield engine
    assert_idle(engine)


def ask(llm: LLM, prompt: str, options: dict[str, Any] | None = None, **data: Any) -> Any:
    request: Any = {"prompt": prompt, "multi_modal_data": data, "mm_processor_kwargs": options or {}}
    (output,) = llm.generate(request, GREEDY, use_tqdm=False)
    return output


def assert_equal(output: Any, expected: tuple[list[int], list[int], list[float]]) -> None:
    prompt, answer, logprobs = expected
    assert output.prompt_token_ids == prompt
    assert output.outputs[0].token_ids == answer
    told = [position[token].logprob for position, token in zip(output.outputs[0].logprobs, answer, strict=True)]
    np.testing.assert_allclose(told, logprobs, atol=1e-4)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_video_of_frames_answers_as_transformers(llm: LLM, served: Served, count: int) -> None:
    video = frames(count)
    assert_equal(ask(llm, TEXT, video=video), served.expected(TEXT, videos=[video]))


def test_pictures_and_videos_in_one_prompt_answer_as_transformers(llm: LLM, served: Served) -> None:
    videos = [frames(3, 90, 40, seed=1), frames(4, 40, 80, seed=2)]
    images = [picture(1, 60, 50), picture(2, 33, 70)]
    text = f"See {IMAGE} and {VIDEO}, then {VIDEO} and {IMAGE}: what is it?"
    expected = served.expected(text, ("image", "video", "video", "image"), images=images, videos=videos)
    assert_equal(ask(llm, text, image=images, video=videos), expected)


def test_time_of_each_step_stands_in_the_prompt(llm: LLM, served: Served) -> None:
    video, stay = frames(6), {"do_sample_frames": False}
    for fps in (8.0, 0.5):
        output = ask(llm, TEXT, stay, video=[(video, {"fps": fps})])
        assert_equal(output, served.expected(TEXT, videos=[video], fps=[fps]))


def test_video_file_is_sampled_by_time(llm: LLM, served: Served) -> None:
    data = encode(frames(30), fps=5)
    is_4_6 = served.model.config.model_type == "glm46v"
    chosen = list(range(30)) if is_4_6 else [-(-5 * i // 2) for i in range(12)]  # six frames a second, or two
    video = [decoded(data)[i] for i in chosen]
    expected = served.expected(TEXT, videos=[video], fps=[5.0], indices=[chosen])
    assert_equal(ask(llm, TEXT, {"do_sample_frames": True}, video=data), expected)


def test_videos_answer_alike_alone_batched_in_chunks_and_with_a_hit_prefix(served: Served) -> None:
    text = f"USER: {VIDEO} What happens, {IMAGE}? ASSISTANT:"
    prompts: Any = [
        {"prompt": text, "multi_modal_data": {"video": [frames(n, seed=n)], "image": picture(n)}} for n in (2, 5, 4)
    ]
    plain = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    roomy, tight = served.make(), served.make(max_num_batched_tokens=16, max_num_batched_patches=16)
    alone = [roomy.generate(p, plain, use_tqdm=False)[0].outputs[0].token_ids for p in prompts]
    for llm in (roomy, tight):
        outputs = llm.generate(prompts, plain, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == alone
    assert roomy.generate(prompts[0], plain, use_tqdm=False)[0].num_cached_tokens > 0


def test_embeddings_of_a_video_are_refused(llm: LLM) -> None:
    given = {"video_embeds": torch.zeros(4, 64), "video_grid_thw": [[1, 4, 4]]}
    with pytest.raises(RequestError, match="time of every frame"):
        ask(llm, TEXT, video=given)
