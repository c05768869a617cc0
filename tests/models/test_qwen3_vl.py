"""Qwen3-VL's rule, and what only Qwen3-VL does, against transformers.

Its video processor needs torchvision for pixels alone; sizes and sampling are run without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import VideoMetadata

from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.layers.rope import axis_of_frequency
from opsin.models.qwen3_vl.rule import Qwen3VLRule
from opsin.models.rule import Positions, TokenRun
from opsin.models.smart_resize import resize_video
from opsin.types import Clip, MediaItem
from tests.factories import hub_configs
from tests.factories.families import QWEN3_VL
from tests.factories.qwen3_vl import hf_inputs
from tests.models.driver import TOLERANCE, Driver, Oracle, Row, meta_model, pictures

CONFIG = hub_configs.QWEN3_VL["qwen3-vl-4b-instruct"]
PROCESSOR: dict[str, Any] = {  # of the hub's checkpoint
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "video_processor": {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}
TOKENS = {
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
}
Tiny = Callable[[Any, str], Path]


class Vocabulary:
    def __init__(self, *without: str) -> None:
        self._without = without

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return None if token in self._without else TOKENS.get(token)


def make_rule(**video: Any) -> Qwen3VLRule:
    processor = PROCESSOR | {"video_processor": PROCESSOR["video_processor"] | video}
    return Qwen3VLRule.from_hf(CONFIG, processor, Vocabulary())


def clip(total: int, frames: Sequence[int] | None = None, fps: float | None = 10.0, size: Any = (640, 360)) -> Clip:
    return Clip(size[0], size[1], total, tuple(range(total) if frames is None else frames), fps)


# ---------------------------------------------------------------------------------------------------------- videos


def test_sizes_of_frames_equal_transformers():
    checked = 0
    sizes = ((640, 360), (33, 700), (20, 20), (31, 900), (4000, 3000), (32, 6500))
    for size, count, bounds in itertools.product(sizes, (2, 3, 5, 32), ((4096, 400_000), (100_000, 25_165_824))):
        width, height = size
        try:
            expected = smart_resize(count, height, width, 2, 32, *bounds)
        except ValueError:
            with pytest.raises(MediaError, match="200 times"):
                resize_video(width, height, count, 2, 32, *bounds)
            continue
        assert resize_video(width, height, count, 2, 32, *bounds) == expected[::-1], (size, count, bounds)
        checked += 1
    assert checked > 30


def test_frames_are_those_that_transformers_samples():
    rule = make_rule()
    hf: Any = SimpleNamespace(num_frames=None, fps=2, min_frames=4, max_frames=768)
    for total, fps in itertools.product((4, 5, 29, 100, 1801, 50_000), (10.0, 23.976, 60.0)):
        for options in ({}, {"num_frames": 4}, {"fps": 1}, {"fps": 2.5}):
            metadata = VideoMetadata(total_num_frames=total, fps=fps)
            asked: Any = options
            expected = Qwen3VLVideoProcessor.sample_frames(hf, metadata, **asked).tolist()
            layout = rule.video_layout(clip(total, fps=fps), options)
            padded = expected + expected[-1:] * (len(expected) % 2)
            assert list(layout.plan.frames) == padded, (total, fps, options)
            times = Qwen3VLProcessor._calculate_timestamps(hf, expected, fps, 2)
            np.testing.assert_allclose(layout.times, times)


def test_chosen_frames_are_taken_as_they_are():
    layout = make_rule().video_layout(clip(100, [0, 40, 99]), {})
    assert layout.plan.frames == (0, 40, 99, 99)
    assert layout.times == (2.0, 9.9)
    assert layout.numbers == (2, 22, 40)
    assert make_rule().video_layout(clip(1, fps=None), {}).plan.frames == (0, 0)


@pytest.mark.parametrize("cap", [True, False])
def test_pixels_of_a_frame_are_capped_as_in_transformers(cap: bool):
    rule = make_rule(size={"longest_edge": 2_000_000, "shortest_edge": 4096}, cap_pixels_per_frame=cap)
    hf: Any = SimpleNamespace(
        size={"longest_edge": 2_000_000, "shortest_edge": 4096},
        cap_pixels_per_frame=cap,
        max_video_tokens=768,
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
    )
    for count in (2, 3, 64):
        layout = rule.video_layout(clip(1000, range(count), size=(1920, 1080)), {})
        assert layout.num_patches == Qwen3VLVideoProcessor.get_num_of_video_patches(hf, count, 1080, 1920)


def test_video_is_written_frame_by_frame_with_its_times():
    rule = make_rule()
    layout = rule.video_layout(
        clip(40, [0, 5, 20, 25], size=(64, 64)), {"size": {"shortest_edge": 1, "longest_edge": 16384}}
    )
    step = [TokenRun(151652), TokenRun(151656, layout.num_features // 2, is_feature=True), TokenRun(151653)]
    assert rule.expand("video", 1, layout) == ["<0.2 seconds>", *step, "<2.2 seconds>", *step]
    mark = rule.placeholder("video")
    assert (mark.text, mark.token_id) == ("<|vision_start|><|video_pad|><|vision_end|>", None)


def test_positions_of_pictures_and_videos_equal_transformers():
    rule = make_rule()
    small = {"size": {"shortest_edge": 4096, "longest_edge": 30_000}}
    image = rule.layout("image", 300, 130, 1, small)
    video = rule.video_layout(clip(5, size=(90, 200)), small | {"do_sample_frames": False})
    ids, kinds = [1, 2], [0, 0]
    for layout, kind in ((image, 1), (video, 2), (image, 1)):
        steps = layout.numbers[0]
        for _ in range(steps):
            count = layout.num_features // steps
            ids += [5, 151652, *[151655 if kind == 1 else 151656] * count, 151653]
            kinds += [0, 0, *[kind] * count, 0]
    items = [MediaItem(b"", "image", image), MediaItem(b"", "video", video), MediaItem(b"", "image", image)]
    get_rope_index: Any = Qwen3VLModel.get_rope_index
    get_vision_position_ids: Any = Qwen3VLModel.get_vision_position_ids
    expected, delta = get_rope_index(
        SimpleNamespace(
            config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)),
            get_vision_position_ids=lambda *given, **more: get_vision_position_ids(None, *given, **more),
        ),
        torch.tensor([ids]),
        torch.tensor([kinds]),
        image_grid_thw=torch.tensor([image.numbers, image.numbers]),
        video_grid_thw=torch.tensor([video.numbers]),
    )
    positions = rule.positions(ids, items)
    assert positions is not None
    assert positions.axes == expected[:, 0].tolist()
    assert positions.delta == delta.item()
    assert rule.positions([1, 2, 3], []) is None


def test_axes_take_turns_at_the_frequencies():
    axes = axis_of_frequency((24, 20, 20), 64, interleaved=True).tolist()
    assert axes == [*[0, 1, 2] * 20, 0, 0, 0, 0]
    assert axis_of_frequency((2, 1, 3), 6, interleaved=True).tolist() == [0, 1, 2, 0, 0, 2]
    assert axis_of_frequency((2, 1, 3), 6).tolist() == [0, 0, 1, 2, 2, 2]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("video", "options", "words"),
    [
        (clip(10), {"num_frames": 4, "fps": 2}, "exclude one another"),
        (clip(10), {"num_frames": 11}, "11 frames"),
        (clip(10), {"tokens": 1}, "tokens"),
        (clip(10, fps=None), {"fps": 1}, "nobody told"),
    ],
)
def test_video_options_that_cannot_be_are_refused(video: Clip, options: dict[str, Any], words: str):
    with pytest.raises(RequestError, match=words):
        make_rule().video_layout(video, options)


def test_embeddings_of_videos_are_refused():
    with pytest.raises(RequestError, match="time of every frame"):
        make_rule().embedding_layout("video", 4, {"video_grid_thw": [1, 4, 4]})


def test_tokenizer_without_tags_is_refused_and_without_videos_takes_pictures():
    with pytest.raises(UnsupportedModelError, match="vision_end"):
        Qwen3VLRule.from_hf(CONFIG, PROCESSOR, Vocabulary("<|vision_end|>"))
    rule = Qwen3VLRule.from_hf(CONFIG, PROCESSOR, Vocabulary("<|video_pad|>"))
    assert (rule.max_items("video"), rule.max_items("image")) == (0, None)
    with pytest.raises(RequestError, match="images only"):
        rule.placeholder("video")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": CONFIG["vision_config"] | {"num_position_embeddings": 2300}}, "only squares"),
        ({"vision_config": CONFIG["vision_config"] | {"deepstack_visual_indexes": [11, 5]}}, "ascending"),
        ({"vision_config": CONFIG["vision_config"] | {"deepstack_visual_indexes": [24]}}, "layers of the tower"),
        ({"vision_config": CONFIG["vision_config"] | {"out_hidden_size": 4096}}, "4096"),
        ({"text_config": CONFIG["text_config"] | {"rope_scaling": {"mrope_interleaved": False}}}, "interleaved"),
        ({"text_config": CONFIG["text_config"] | {"num_experts": 128}}, "num_experts"),
        ({"vision_config": None}, "vision_config"),
    ],
)
def test_config_that_is_not_implemented_is_refused(change: dict[str, Any], words: str):
    with pytest.raises(UnsupportedModelError, match=words):
        meta_model(CONFIG | change)


def test_features_of_the_hub_s_checkpoint_reach_three_layers():
    model = meta_model(CONFIG)
    assert (model.spec.hidden_size, model.spec.feature_width) == (2560, 4 * 2560)
    rope = model.decoder.config.rope
    assert (rope.theta, rope.sections, rope.interleaved) == (5e6, (24, 20, 20), True)


# -------------------------------------------------------------------------------------------------------- mistakes


def test_likely_mistakes_move_the_logits(tiny: Tiny):
    folder = tiny(QWEN3_VL, "deep-2")
    images = pictures(QWEN3_VL.sizes)
    expected = Oracle(QWEN3_VL.load(folder)).logits(hf_inputs(folder, QWEN3_VL.question, images))

    driver = Driver(folder)

    def moved(change: Callable[[Row], None]) -> float:
        row = driver.prompt(QWEN3_VL.question, images)
        change(row)
        return (driver.prefill(row) - expected).abs().max().item()

    def unchanged(row: Row) -> None:
        pass

    def without_deeper(row: Row) -> None:
        assert row.features is not None
        row.features = row.features[:, :64]

    def deeper_exchanged(row: Row) -> None:
        assert row.features is not None
        own, first, second = row.features.split(64, dim=1)
        row.features = torch.cat([own, second, first], dim=1)

    def shifted(row: Row) -> None:
        assert row.features is not None
        row.features = row.features.roll(1, 0)

    def rows_for_columns(row: Row) -> None:
        assert row.positions is not None
        steps, rows, cols = row.positions.axes
        row.positions = Positions((steps, cols, rows), row.positions.delta)

    def axes_in_blocks(row: Row) -> None:
        model: Any = driver.model
        model.decoder.rope.axis_R = axis_of_frequency((2, 3, 3), 8)

    assert moved(unchanged) < TOLERANCE
    for mistake in (without_deeper, deeper_exchanged, shifted, rows_for_columns, axes_in_blocks):
        assert moved(mistake) > 1000 * TOLERANCE, mistake
