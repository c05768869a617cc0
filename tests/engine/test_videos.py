"""Videos through ``LLM``, held to transformers: Qwen2-VL, Qwen2.5-VL, InternVL, LLaVA-OneVision and
SmolVLM.

Its video processors need torchvision. So what its models are given is made by its Pillow picture processors, frame by
frame, at the sizes and in the order in which its video processors lay them; see ``tests/factories``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from opsin import LLM, MediaError, RequestError, SamplingParams
from tests.engine.conftest import assert_idle, engines_over, hf_model, picture
from tests.factories import idefics3, internvl, llava_onevision, qwen2_vl
from tests.factories.idefics3 import Idefics3Shape
from tests.factories.internvl import InternVLShape
from tests.factories.llava_onevision import OnevisionShape
from tests.factories.qwen2_vl import Qwen2VLShape
from tests.media.clips import decoded, encode, frames

NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0)
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


class Case(NamedTuple):
    write: Callable[[Path, Any], Path]
    shape: Any
    hf_inputs: Callable[..., dict[str, torch.Tensor]]
    image: str
    video: str


CASES = {
    "qwen2": Case(
        qwen2_vl.write_qwen2_vl, Qwen2VLShape(max_pixels=12 * 256), qwen2_vl.hf_inputs, qwen2_vl.IMAGE, QWEN_VIDEO
    ),
    "qwen2.5": Case(
        qwen2_vl.write_qwen2_vl,
        Qwen2VLShape(version="2.5", max_pixels=12 * 256),
        qwen2_vl.hf_inputs,
        qwen2_vl.IMAGE,
        QWEN_VIDEO,
    ),
    "internvl": Case(internvl.write_internvl, InternVLShape(), internvl.hf_inputs, internvl.IMAGE, internvl.VIDEO),
    "onevision": Case(
        llava_onevision.write_llava_onevision,
        OnevisionShape(),
        llava_onevision.hf_inputs,
        llava_onevision.IMAGE,
        llava_onevision.VIDEO,
    ),
    "smolvlm": Case(
        idefics3.write_idefics3,
        Idefics3Shape(version="smolvlm", longest_edge=64, seed=1),
        idefics3.hf_inputs,
        idefics3.IMAGE,
        idefics3.VIDEO,
    ),
}


class Served(NamedTuple):
    """A checkpoint, transformers' model of it, and engines over it."""

    case: Case
    folder: Path
    model: Any
    make: Callable[..., LLM]

    def prompt(self, text: str) -> str:
        return text.replace("[image]", self.case.image).replace("[video]", self.case.video)

    @property
    def tells_time(self) -> bool:
        """Qwen2.5-VL's positions run with the clock, and SmolVLM's prompt says when each frame was."""
        return any(name in type(self.model).__name__ for name in ("Qwen2_5", "SmolVLM"))

    def timing(self, fps: float, chosen: Sequence[int], total: int) -> dict[str, Any]:
        """What ``hf_inputs`` must know of a video's frames ``chosen`` out of ``total``, where the family tells time."""
        if "Qwen2_5" in type(self.model).__name__:
            return {"fps": [len(chosen) / total * fps]}
        if "SmolVLM" in type(self.model).__name__:
            return {"metadata": [{"fps": fps, "duration": total / fps, "frames_indices": list(chosen)}]}
        return {}

    def expected(self, text: str, **media: Any) -> tuple[list[int], list[int], list[float]]:
        """Prompt ids, greedy tokens, and the log-probability of every token behind the first, by transformers."""
        inputs = self.case.hf_inputs(self.folder, self.prompt(text), **media)
        prompt = inputs["input_ids"][0].tolist()
        ids, logprobs = list(prompt), torch.empty(0)
        for _ in range(NUM_TOKENS + 1):
            inputs["input_ids"] = torch.tensor([ids])
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "mm_token_type_ids" in inputs:
                kinds = inputs["mm_token_type_ids"][:, : len(ids)]
                inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(ids) - kinds.shape[1]))
                inputs["position_ids"] = qwen2_vl.positions(self.model.model, inputs)
            with torch.inference_mode():
                logprobs = self.model(**inputs).logits[0].log_softmax(-1)
            ids.append(int(logprobs[-1].argmax()))
        ids.pop()
        return prompt, ids[len(prompt) :], logprobs[range(len(ids) - 1), ids[1:]].tolist()


@pytest.fixture(scope="module", params=CASES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    case = CASES[request.param]
    folder = case.write(tmp_path_factory.mktemp(request.param), case.shape)
    with engines_over(folder) as make:
        yield Served(case, folder, hf_model(folder), make)


@pytest.fixture
def llm(served: Served) -> Iterator[LLM]:
    engine = served.make(limit_mm_per_prompt={"image": 4, "video": 4})
    yield engine
    assert_idle(engine)


def ask(llm: LLM, prompt: str, **data: Any) -> Any:
    request: Any = {"prompt": prompt, "multi_modal_data": data}
    (output,) = llm.generate(request, GREEDY, use_tqdm=False)
    return output


def assert_equal(output: Any, expected: tuple[list[int], list[int], list[float]]) -> None:
    prompt, answer, logprobs = expected
    assert output.prompt_token_ids == prompt
    assert output.outputs[0].token_ids == answer
    told = [position[token].logprob for position, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    told += [position[token].logprob for position, token in zip(output.outputs[0].logprobs, answer, strict=True)]
    np.testing.assert_allclose(told, logprobs, atol=1e-4)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_video_of_frames_answers_as_transformers(llm: LLM, served: Served, count: int) -> None:
    """An odd number of frames is made even where frames go in pairs."""
    video = frames(count)
    text = "USER: [video]\nWhat happens? ASSISTANT:"
    assert_equal(ask(llm, served.prompt(text), video=video), served.expected(text, videos=[video]))


def test_pictures_and_videos_in_one_prompt_answer_as_transformers(llm: LLM, served: Served) -> None:
    few = 4 if "Onevision" in type(served.model).__name__ else 3  # its model takes as many of each
    videos = [frames(few, 90, 40, seed=1), frames(4, 40, 80, seed=2)]
    images = [picture(1, 60, 50), picture(2, 33, 70)]
    text = "See [image] and [video], then [video] and [image]: what is it?"
    output = ask(llm, served.prompt(text), image=images, video=videos)
    assert_equal(output, served.expected(text, images=images, videos=videos))


def test_speed_of_a_video_counts_where_transformers_counts_it(llm: LLM, served: Served) -> None:
    video, text = frames(6), "[video] What happens?"
    fast, slow = (ask(llm, served.prompt(text), video=[(video, {"fps": fps})]) for fps in (8.0, 0.5))
    speeds = [served.timing(fps, range(6), 6) for fps in (8.0, 0.5)]
    assert_equal(fast, served.expected(text, videos=[video], **speeds[0]))
    assert_equal(slow, served.expected(text, videos=[video], **speeds[1]))
    differ = fast.outputs[0].cumulative_logprob != slow.outputs[0].cumulative_logprob
    assert differ == served.tells_time


def test_metadata_of_a_selection_says_how_fast_it_is(llm: LLM, served: Served) -> None:
    video, text = frames(4), "[video] What happens?"
    metadata = {"fps": 10.0, "total_num_frames": 60, "frames_indices": [0, 20, 40, 59], "duration": 6.0}
    output = ask(llm, served.prompt(text), video=(np.stack([np.asarray(f) for f in video]), metadata))
    timing = served.timing(10.0, metadata["frames_indices"], 60)
    assert_equal(output, served.expected(text, videos=[video], **timing))


def test_video_file_answers_as_its_frames_do_in_transformers(llm: LLM, served: Served, tmp_path: Path) -> None:
    data = encode(frames(9), fps=5)
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    text = "[video] What happens?"
    expected = served.expected(text, videos=[decoded(data)], **served.timing(5.0, range(9), 9))
    for video in (data, str(path), path, [path]):
        assert_equal(ask(llm, served.prompt(text), video=video), expected)


def test_frames_are_chosen_as_the_engine_is_told(served: Served) -> None:
    data = encode(frames(30), fps=10)
    every = decoded(data)
    text = "[video] What happens?"
    for told, chosen in (
        ({"num_frames": 4}, [0, 9, 19, 29]),
        ({"num_frames": -1, "fps": 2}, [0, 5, 11, 17, 23, 29]),
        ({"num_frames": 5, "fps": 2}, [0, 7, 14, 21, 29]),
    ):
        llm = served.make(media_io_kwargs={"video": told})
        timing = served.timing(10.0, chosen, 30)
        expected = served.expected(text, videos=[[every[i] for i in chosen]], **timing)
        assert_equal(ask(llm, served.prompt(text), video=data), expected)


def test_frames_are_sampled_as_the_processor_is_told(llm: LLM, served: Served) -> None:
    """``fps`` and ``num_frames`` of the family's own sampling choose out of the whole video."""
    data = encode(frames(30), fps=10)
    every, text = decoded(data), "[video] What happens?"
    chosen = [0, 7, 15, 22]
    asked: list[dict[str, Any]] = [{"num_frames": 4}, {"fps": 4 / 3, "do_sample_frames": True}]
    if "InternVL" in type(served.model).__name__:  # from the middle of each share
        chosen = [3, 11, 18, 26]
    if "SmolVLM" in type(served.model).__name__:  # from end to end; it must know both
        chosen, asked = [0, 9, 19, 29], [{"num_frames": 4, "fps": 2}, {"num_frames": 9, "fps": 4 / 3}]
    request: Any = {"prompt": served.prompt(text), "multi_modal_data": {"video": data}}
    expected = served.expected(text, videos=[[every[i] for i in chosen]], **served.timing(10.0, chosen, 30))
    for options in asked:
        (output,) = llm.generate(request | {"mm_processor_kwargs": options}, GREEDY, use_tqdm=False)
        assert_equal(output, expected)


# -------------------------------------------------------------------------------------------------- the engine


def test_frames_in_one_tensor_answer_as_pictures(llm: LLM, served: Served) -> None:
    video, prompt = frames(4, seed=6), served.prompt("[video] And?")
    pixels = np.stack([np.asarray(frame) for frame in video])
    tensor = torch.from_numpy(pixels)
    as_processors_have_it = tensor.permute(0, 3, 1, 2).float()
    first, *others = (
        ask(llm, prompt, video=form).outputs[0].token_ids
        for form in (video, pixels, tensor, as_processors_have_it, [as_processors_have_it])
    )
    assert all(answer == first for answer in others)
    with pytest.raises(MediaError, match="uint8"):
        ask(llm, prompt, video=tensor.float() / 255)


def test_equal_videos_are_decoded_once_and_share_features(served: Served) -> None:
    llm = served.make(enable_prefix_caching=False)
    data, prompt = encode(frames(6)), served.prompt("[video] And?")
    before = llm.stats()["num_pictures_decoded_total"]
    first, again = ask(llm, prompt, video=data), ask(llm, prompt, video=data)
    assert llm.stats()["num_pictures_decoded_total"] == before + 1
    assert first.outputs[0].token_ids == again.outputs[0].token_ids
    ask(served.make(enable_prefix_caching=False), prompt, video=encode(frames(6, seed=5)))
    assert llm.stats()["num_pictures_decoded_total"] == before + 2


def test_videos_answer_alike_alone_batched_in_chunks_and_with_a_hit_prefix(served: Served) -> None:
    text = served.prompt("USER: [video] What happens, [image]? ASSISTANT:")
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


def test_passes_of_the_tower_are_as_good_as_one(served: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    video, text = frames(6, seed=9), "[video] What happens?"
    monkeypatch.setattr("opsin.models.towers.patches.MAX_PASS", 20)
    assert_equal(ask(llm, served.prompt(text), video=video), served.expected(text, videos=[video]))


def test_embeddings_of_a_video_answer_as_its_frames(served: Served, llm: LLM) -> None:
    video, text = frames(4, seed=3), "[video] What happens?"
    inputs = served.case.hf_inputs(served.folder, served.prompt(text), videos=[video])
    with torch.inference_mode():
        if "video_grid_thw" in inputs:
            media = {key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw")}
            features = torch.cat(list(served.model.model.get_video_features(**media).pooler_output))
            given: Any = {"video_embeds": features, "video_grid_thw": inputs["video_grid_thw"]}
        elif "pixel_values_videos" in inputs:
            features = served.model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
            given = {"video_embeds": features}
        else:
            features = served.model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
            given = {"video_embeds": torch.cat(list(features))[None]}
    speed = {"fps": [2.0]} if "Qwen2_5" in type(served.model).__name__ else {}  # one second a step, where nobody says
    assert_equal(ask(llm, served.prompt(text), video=given), served.expected(text, videos=[video], **speed))


# ------------------------------------------------------------------------------------------------ conversations


def test_conversation_shows_a_video_in_every_form(served: Served, llm: LLM, tmp_path: Path) -> None:
    video = frames(4)
    data = encode(video)
    (tmp_path / "clip.mp4").write_bytes(data)
    local = served.make(allowed_local_media_path=str(tmp_path))

    def chat(engine: LLM, part: Any, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}]
        template = (
            "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'video' %}"
            + served.case.video
            + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
        )
        (output,) = engine.chat(messages, GREEDY, chat_template=template, use_tqdm=False, **options)
        return output.outputs[0].token_ids

    expected = ask(llm, served.prompt("[video]What happens?"), video=data).outputs[0].token_ids
    assert chat(llm, {"type": "video", "video": data}) == expected
    assert chat(local, {"type": "video_url", "video_url": {"url": f"file://{tmp_path}/clip.mp4"}}) == expected
    assert chat(local, {"type": "video", "video": f"file://{tmp_path}/clip.mp4"}) == expected
    two = ask(llm, served.prompt("[video]What happens?"), video=[decoded(data)[0], decoded(data)[3]])
    shorter = {"video": {"num_frames": 2}}
    of_two = chat(llm, {"type": "video", "video": data}, media_io_kwargs=shorter)
    if not served.tells_time:  # where time counts, two frames of four are not two frames
        assert of_two == two.outputs[0].token_ids
    with pytest.raises(RequestError, match="media_io_kwargs"):
        chat(llm, {"type": "video", "video": data}, media_io_kwargs={"video": {"frames": 2}})


# ------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("video", "error", "reason"),
    [
        ([], RequestError, "1 video placeholder"),
        ([[]], MediaError, "not one frame"),
        ([["/etc/hostname", "/etc/hostname"]], MediaError, "not paths"),
        ([picture(1), picture(2, 33, 20)], MediaError, "one size"),
        (np.zeros((2, 8, 8, 3), np.float32), MediaError, "uint8"),
        ((frames(2), {"speed": 3}), MediaError, "unknown keys: speed"),
        ((frames(2), {"fps": 0}), MediaError, "above 0"),
        ((frames(2), {"frames_indices": [1]}), MediaError, "frames_indices"),
        (b"junk", MediaError, "not a video"),
        (b"", MediaError, "0 bytes"),
        (frames(800, 8, 8), MediaError, "max_video_frames"),
        ({"a": 1}, RequestError, "video_embeds"),
    ],
)
def test_video_that_cannot_be_used_is_refused(
    llm: LLM, served: Served, video: Any, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        ask(llm, served.prompt("[video]"), video=video)


def test_broken_video_fails_alone(llm: LLM, served: Served) -> None:
    data = bytearray(encode(frames(12)))
    at = data.index(b"mdat") + 200
    data[at : at + 1500] = bytes(1500)
    good: Any = {"prompt": served.prompt("[video]"), "multi_modal_data": {"video": encode(frames(4))}}
    bad: Any = {"prompt": served.prompt("[video]"), "multi_modal_data": {"video": encode(frames(4))[:-400]}}
    outputs: list[Any] = llm.generate([bad, good], GREEDY, use_tqdm=False, return_exceptions=True)
    assert isinstance(outputs[0], MediaError)
    assert outputs[0].code == "video_parse_error"
    assert len(outputs[1].outputs[0].token_ids) == NUM_TOKENS


def test_too_many_videos_are_refused(served: Served) -> None:
    with pytest.raises(RequestError, match=r"At most 1 video\(s\)"):
        ask(served.make(limit_mm_per_prompt={"video": 1}), served.prompt("[video][video]"), video=[frames(1)] * 2)
