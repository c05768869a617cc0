"""GLM-4.1V's and GLM-4.6V's rule against Hugging Face's processors and rope index: pixels, grids, frames, positions.

Their video processors need torchvision for pixels alone; sizes and sampling are run without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Glm4vConfig, Glm4vProcessor, Glm46VProcessor
from transformers.models.glm4v import image_processing_pil_glm4v as hf
from transformers.models.glm4v.modeling_glm4v import Glm4vModel
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.video_utils import VideoMetadata

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models.glm4v.rule import Glm4vRule
from opsin.models.rule import TokenRun
from opsin.types import Clip, MediaItem
from tests.factories.hub_configs import GLM4V
from tests.factories.hub_processors import PICTURES
from tests.models.stubbed import video_processor

CONFIG = GLM4V["glm-4.1v-9b-thinking"]
PROCESSORS: dict[str, Any] = {"4.1": hf.Glm4vImageProcessorPil, "4.6": Glm46VImageProcessorPil}
TOKENS = {
    "<|begin_of_image|>": 151339,
    "<|end_of_image|>": 151340,
    "<|begin_of_video|>": 151341,
    "<|end_of_video|>": 151342,
    "<|image|>": 151343,
    "<|video|>": 151344,
}
IMAGE = 151343
SMALL: dict[str, Any] = {"size": {"shortest_edge": 2 * 28 * 28, "longest_edge": 80 * 28 * 28}}


class Vocabulary:
    def __init__(self, *without: str) -> None:
        self._without = without

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return None if token in self._without else TOKENS.get(token)


def make_rule(version: str = "4.1", pictures: Mapping[str, Any] | None = None, **video: Any) -> Glm4vRule:
    name = {"4.1": "Glm4v", "4.6": "Glm46V"}[version]
    processor = PICTURES["glm-4.1v"] | {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        **(pictures or {}),
        "video_processor": {"video_processor_type": f"{name}VideoProcessor", **video},
    }
    return Glm4vRule.from_hf(CONFIG, processor, Vocabulary())


def clip(total: int, frames: Sequence[int] | None = None, fps: float | None = 10.0, size: Any = (640, 360)) -> Clip:
    return Clip(size[0], size[1], total, tuple(range(total) if frames is None else frames), fps)


# --------------------------------------------------------------------------------------------------------- pictures


def our_patches(rule: Glm4vRule, image: Image.Image, options: Mapping[str, Any]) -> np.ndarray:
    """(P, 3 * 2 * 14**2) float32 in merge order, both frames, as Hugging Face lays them out."""
    layout = rule.layout("image", *image.size, 1, options)
    out = np.full(layout.plan.num_bytes, 99, np.uint8)
    make_tiles(open_picture(image, MediaConfig()).decode(), layout.plan, out)
    _, rows, cols = layout.numbers
    pixels = out.reshape(rows * 14, cols * 14, 3)
    normal = np.stack([rule.norm.table()[pixels[..., c], c] for c in range(3)])
    grid = normal.reshape(3, rows // 2, 2, 14, cols // 2, 2, 14).transpose(1, 4, 2, 5, 0, 3, 6)
    return np.repeat(grid[:, :, :, :, :, None], 2, axis=5).reshape(rows * cols, -1)


@pytest.mark.parametrize("version", PROCESSORS)
@pytest.mark.parametrize(
    "options",
    [{}, {"resample": 0}, {"size": {"shortest_edge": 784, "longest_edge": 9 * 1568}}, {"do_resize": False}],
    ids=str,
)
def test_pixels_equal_transformers(version: str, options: dict[str, Any]):
    rule, processor = make_rule(version, SMALL), PROCESSORS[version](**SMALL)
    sizes = [(1, 1), (7, 30), (1, 150), (150, 1), (27, 29), (300, 40), (56, 84), (13, 2000), (640, 480), (500, 470)]
    for width, height in sizes if options.get("do_resize", True) else [(56, 84), (28, 28), (280, 56)]:
        rng = np.random.default_rng(width * 10_007 + height)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = processor(image, return_tensors="np", **options)
        layout = rule.layout("image", width, height, 1, options)
        assert layout.numbers == tuple(expected["image_grid_thw"][0]), image.size
        assert layout.num_patches == 4 * layout.num_features == len(expected["pixel_values"])
        np.testing.assert_array_equal(our_patches(rule, image, options), expected["pixel_values"], err_msg=str(image))


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), bounds=st.sampled_from([(12544, 9633792), (9, 90)]))
def test_sizes_equal_transformers(width: int, height: int, bounds: tuple[int, int]):
    rule = make_rule(pictures={"size": dict(zip(("shortest_edge", "longest_edge"), bounds, strict=True))})
    try:
        expected = hf.smart_resize(2, height, width, 2, 28, *bounds)
    except ValueError:
        with pytest.raises(MediaError, match="200 times"):
            rule.layout("image", width, height, 1, {})
        return
    view = rule.layout("image", width, height, 1, {}).plan.views[0]
    assert (view.height, view.width) == expected


def test_picture_counts_as_two_frames():
    """So a checkpoint's bounds hold half of what Qwen2-VL's would."""
    layout = make_rule().layout("image", 6000, 4000, 1, {})
    assert layout.numbers == (1, 128, 192)
    assert layout.num_features == 6144


# ----------------------------------------------------------------------------------------------------------- videos


def test_sizes_of_frames_equal_transformers():
    rule = make_rule(size={"shortest_edge": 12544, "longest_edge": 3_000_000})
    for (width, height), count in itertools.product(
        ((640, 360), (33, 700), (20, 20), (27, 900), (4000, 3000)), (2, 3, 5, 32)
    ):
        layout = rule.video_layout(clip(1000, range(count), size=(width, height)), {})
        view = layout.plan.views[0]
        assert (view.height, view.width) == hf.smart_resize(count, height, width, 2, 28, 12544, 3_000_000)
        assert layout.numbers[0] == -(-count // 2) == len(layout.plan.frames) // 2


def sampled(version: str, total: int, fps: float, options: Mapping[str, Any]) -> list[int]:
    hf_class = video_processor(
        *{"4.1": ("glm4v", "Glm4vVideoProcessor"), "4.6": ("glm46v", "Glm46VVideoProcessor")}[version]
    )
    processor: Any = SimpleNamespace(fps=2, max_duration=300, temporal_patch_size=2)
    metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
    return hf_class.sample_frames(processor, metadata, **options).tolist()


LENGTHS = (1, 2, 3, 5, 29, 100, 301, 899, 905, 1801, 9001, 50_000, 200_000)


@pytest.mark.parametrize("fps", [0.5, 1.0, 10.0, 23.976, 29.97, 60.0])
def test_frames_are_those_that_transformers_samples(fps: float):
    rule = make_rule()
    for total, options in itertools.product(LENGTHS, ({}, {"fps": 1}, {"fps": 2.5}, {"fps": 60})):
        layout = rule.video_layout(clip(total, fps=fps), options)
        expected = sampled("4.1", total, fps, options)
        assert list(layout.plan.frames) == expected, (total, options)
        assert layout.times == tuple(frame / fps for frame in expected[::2])


@pytest.mark.parametrize("fps", [0.25, 1.0, 5.0, 23.976, 29.97, 60.0])
def test_frames_by_length_are_those_that_transformers_samples(fps: float):
    rule = make_rule("4.6")
    for total in LENGTHS:
        expected = sampled("4.6", total, fps, {})
        if not expected:  # of a sixth of a second, where transformers goes on with no frame at all
            expected = [0, 0]
        assert list(rule.video_layout(clip(total, fps=fps), {}).plan.frames) == expected, total


def test_chosen_frames_are_taken_as_they_are():
    layout = make_rule().video_layout(clip(100, [0, 40, 99]), {})
    assert layout.plan.frames == (0, 40, 99, 99)
    assert layout.times == (0.0, 9.9)
    assert make_rule().video_layout(clip(1, fps=None), {}).plan.frames == (0, 0)
    stays = {"do_sample_frames": False}
    assert make_rule().video_layout(clip(3), stays).plan.frames == (0, 1, 2, 2)


@pytest.mark.parametrize(("version", "joint"), [("4.1", Glm4vProcessor), ("4.6", Glm46VProcessor)])
def test_video_is_written_as_transformers_writes_it(version: str, joint: Any):
    rule = make_rule(version)
    small = {"size": {"shortest_edge": 1, "longest_edge": 20_000}}
    layout = rule.video_layout(clip(40, [0, 5, 19, 25], size=(64, 64)), small)
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2),
        image_token="<|image|>",
        replace_frame_token_id=lambda *given, **more: joint.replace_frame_token_id(processor, *given, **more),
    )
    about = VideoMetadata(total_num_frames=40, fps=10.0, frames_indices=[0, 5, 19, 25])
    given = {"video_grid_thw": torch.tensor([layout.numbers]), "video_metadata": [about]}
    names = {token_id: token for token, token_id in TOKENS.items()}
    written = "".join(
        part if isinstance(part, str) else names[part.token_id] * part.count for part in rule.expand("video", 1, layout)
    )
    assert written == joint.replace_video_token(processor, given, 0)
    assert written.endswith({"4.1": "<|end_of_image|>1", "4.6": "<|end_of_image|>1.9 seconds"}[version])
    features = [run for run in rule.expand("video", 1, layout) if isinstance(run, TokenRun) and run.is_feature]
    assert sum(run.count for run in features) == layout.num_features


def test_marks_of_pictures_and_videos_keep_their_tags():
    rule = make_rule()
    for modality, token in (("image", "<|image|>"), ("video", "<|video|>")):
        mark = rule.placeholder(modality)  # type: ignore[arg-type]
        assert mark.text == f"<|begin_of_{modality}|>{token}<|end_of_{modality}|>"
        assert mark.token_id == TOKENS[token]


def test_positions_of_pictures_and_videos_equal_transformers():
    rule = make_rule()
    small = {"size": {"shortest_edge": 1, "longest_edge": 60_000}, "do_sample_frames": False}
    image = rule.layout("image", 300, 130, 1, {"size": small["size"]})
    video = rule.video_layout(clip(5, size=(90, 200)), small)
    ids, kinds = [1, 2], [0, 0]
    for layout, kind in ((image, 1), (video, 2), (image, 1)):
        steps = layout.numbers[0]
        for _ in range(steps):
            count = layout.num_features // steps
            ids += [5, 151339, *[IMAGE] * count, 151340, 6]
            kinds += [0, 0, *[kind] * count, 0, 0]
    items = [MediaItem(b"", "image", image), MediaItem(b"", "video", video), MediaItem(b"", "image", image)]
    with torch.device("meta"):
        model: Any = Glm4vModel._from_config(
            Glm4vConfig(text_config={"num_hidden_layers": 1}, vision_config={"depth": 1})
        )
    expected, delta = model.get_rope_index(
        input_ids=torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor([image.numbers, image.numbers]),
        video_grid_thw=torch.tensor([video.numbers]),
    )
    positions = rule.positions(ids, items)
    assert positions is not None
    assert positions.axes == expected[:, 0].tolist()
    assert positions.delta == delta.item()
    assert rule.positions([1, 2, 3], []) is None


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("version", "video", "options", "words"),
    [
        ("4.1", clip(10), {"num_frames": 4}, "cannot change num_frames"),
        ("4.6", clip(10), {"fps": 4}, "cannot change fps"),
        ("4.1", clip(10), {"max_image_size": {"longest_edge": 4}}, "cannot change max_image_size"),
        ("4.1", clip(10), {"tokens": 1}, "tokens"),
        ("4.1", clip(10, fps=None), {"do_sample_frames": True}, "nobody told"),
        ("4.6", clip(10, fps=None), {"do_sample_frames": True}, "nobody told"),
        ("4.1", clip(1000), {"fps": 1e9}, "too many"),
        ("4.1", clip(1000), {"fps": 0}, "above 0"),
    ],
)
def test_video_options_that_cannot_be_are_refused(version: str, video: Clip, options: dict[str, Any], words: str):
    with pytest.raises(RequestError, match=words):
        make_rule(version).video_layout(video, options)


def test_embeddings_of_videos_are_refused():
    with pytest.raises(RequestError, match="time of every frame"):
        make_rule().embedding_layout("video", 4, {"video_grid_thw": [1, 4, 4]})


def test_tokenizer_without_tags_is_refused_and_without_videos_takes_pictures():
    pictures = PICTURES["glm-4.1v"]
    with pytest.raises(UnsupportedModelError, match="end_of_image"):
        Glm4vRule.from_hf(CONFIG, pictures, Vocabulary("<|end_of_image|>"))
    rule = Glm4vRule.from_hf(CONFIG, pictures, Vocabulary("<|video|>"))
    assert (rule.max_items("video"), rule.max_items("image")) == (0, None)
    with pytest.raises(RequestError, match="images only"):
        rule.placeholder("video")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "Qwen2VLImageProcessor"),
        ({"processor_class": "GlmgaProcessor"}, "GlmgaProcessor"),
        ({"min_pixels": 784}, "min_pixels"),
        ({"patch_size": 16}, "patch_size"),
        ({"size": {"height": 28, "width": 28}}, "size is"),
        ({"video_processor": {"max_frames": 4}}, "max_frames"),
        ({"video_processor": {"image_mean": [0.5, 0.5, 0.5]}}, "must be those of pictures"),
    ],
)
def test_processor_that_is_not_implemented_is_refused(change: dict[str, Any], words: str):
    with pytest.raises(UnsupportedModelError, match=words):
        Glm4vRule.from_hf(CONFIG, PICTURES["glm-4.1v"] | change, Vocabulary())


@pytest.mark.parametrize(
    ("config", "processor", "version"),
    [
        ({}, {}, "4.1"),
        ({"model_type": "glm46v"}, {}, "4.6"),
        ({}, {"processor_class": "Glm46VProcessor"}, "4.6"),  # as GLM-4.6V-Flash has been released
        ({"model_type": "glm46v"}, {"processor_class": "Glm4vProcessor"}, "4.1"),
    ],
)
def test_version_is_that_of_the_processor(config: dict[str, Any], processor: dict[str, Any], version: str):
    rule = Glm4vRule.from_hf(CONFIG | config, processor, Vocabulary())
    assert (rule.is_4_6, rule.samples_by_length) == ((True, True) if version == "4.6" else (False, False))
