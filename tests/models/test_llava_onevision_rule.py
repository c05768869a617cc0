"""What LLaVA-OneVision's rule does otherwise than LLaVA-NeXT's, against Hugging Face's Pillow-backed processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models.llava_onevision.rule import LlavaOnevisionRule, shrunk
from opsin.models.rule import TokenRun
from opsin.types import Clip
from tests.factories.llava_onevision import PINPOINTS, TILE, build_image_processor, build_processor

VISION: dict[str, Any] = {"model_type": "siglip_vision_model", "image_size": TILE, "patch_size": 8}
VIDEO: dict[str, Any] = {"size": {"height": TILE, "width": TILE}}
GRID = TILE // 8
SIZES = [(1, 1), (1, 40), (2, 300), (300, 2), (32, 32), (64, 64), (65, 63), (96, 32), (33, 101), (200, 113), (640, 481)]
SIZES += [(1, 5000), (5000, 1)]
HUGE = (3000, 2001)


class Tokenizer:
    def convert_tokens_to_ids(self, token: str) -> int | None:
        return {"<image>": 4, "<video>": 5}.get(token)


def make_rule(processor: Mapping[str, Any] | None = None, **config: Any) -> LlavaOnevisionRule:
    base = {"vision_config": VISION, "image_token_index": 4, "video_token_index": 5, "image_grid_pinpoints": PINPOINTS}
    settings = build_image_processor().to_dict() if processor is None else processor
    limit = {"vision_aspect_ratio": config["vision_aspect_ratio"]} if "vision_aspect_ratio" in config else {}
    return LlavaOnevisionRule.from_hf(base | config, limit | dict(settings), Tokenizer())


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10_007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalized(rule: LlavaOnevisionRule, image: Image.Image, options: Mapping[str, Any] | None = None) -> np.ndarray:
    """(tiles, 3, height, width) float32, as the tower sees it."""
    source = open_picture(image, MediaConfig())
    plan = rule.layout("image", *source.size, 1, options or {}).plan
    out = np.full(plan.num_bytes, 99, np.uint8)
    make_tiles(source.decode(), plan, out)
    pixels = out.reshape(-1, TILE, TILE, 3)
    return np.stack([rule.norm.table()[pixels[..., channel], channel] for channel in range(3)], axis=1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"resample": 2}, {"do_normalize": False}, {"do_pad": False}, {"image_mean": [0.5, 0.4, 0.3]}],
    ids=str,
)
def test_pixels_over_sizes_equal_hf(settings: dict[str, Any]) -> None:
    processor = build_image_processor(**settings)
    rule = make_rule(processor.to_dict())
    for size in SIZES if settings else [*SIZES, HUGE]:
        image = noise(*size)
        expected = processor([image], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(normalized(rule, image), expected, err_msg=str(size))


@pytest.mark.parametrize("options", [{"resample": 0}, {"do_pad": False}, {"size": [TILE, TILE]}, {"crop_size": TILE}])
def test_options_per_request_equal_hf(options: dict[str, Any]) -> None:
    image = noise(120, 77)
    expected = build_image_processor()([image], return_tensors="np", **options)
    np.testing.assert_array_equal(normalized(make_rule(), image, options), expected["pixel_values"][0])


@pytest.mark.parametrize("max_tiles", [2, 3, 5, 9])
def test_num_features_over_a_grid_of_sizes_equal_hf(max_tiles: int) -> None:
    limit = f"anyres_max_{max_tiles}"
    processor = build_processor(build_image_processor(), num_image_tokens=GRID**2, vision_aspect_ratio=limit)
    rule = make_rule(vision_aspect_ratio=limit)
    sides = [1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 333, 1000, 4097, 100_000]
    for width in sides:
        for height in sides:
            layout = rule.layout("image", width, height, 1, {})
            expected = processor._get_number_of_features(height, width, TILE, TILE)
            assert layout.num_features == expected, (width, height)
            assert list(rule.expand("image", 1, layout)) == [TokenRun(4, expected, is_feature=True)]


def test_num_features_of_the_hub_s_checkpoints_equal_hf_at_every_aspect_ratio() -> None:
    rule = LlavaOnevisionRule.from_hf({"video_token_index": 5}, {}, Tokenizer())
    processor = build_processor(
        build_image_processor(image_grid_pinpoints=[list(pair) for pair in rule.pinpoints]),
        num_image_tokens=27**2,
        vision_aspect_ratio="anyres_max_9",
    )
    rng = np.random.default_rng(0)
    for width, height in [(55, 88), (99, 88), (176, 55), *rng.integers(1, 4000, (2000, 2)).tolist()]:
        expected = processor._get_number_of_features(height, width, 384, 384)
        assert rule.layout("image", width, height, 1, {}).num_features == expected, (width, height)
    assert rule.layout("image", 2304, 2304, 1, {}).num_features == 729 + 81 * 82


def test_mosaic_barely_over_the_limit_stays_whole() -> None:
    assert shrunk(12, 12, 4, 9) == (12, 12)
    assert shrunk(13, 13, 4, 9) == (13, 13)  # 1.083 times the edge
    assert shrunk(14, 14, 4, 9) == (11, 11)  # 14 // (14 / 12), in floats as Hugging Face computes it
    assert shrunk(15, 15, 4, 9) == (12, 12)


def test_mosaic_that_would_shrink_to_nothing_is_refused() -> None:
    rule = make_rule(
        {**build_image_processor().to_dict(), "image_grid_pinpoints": [[32, 288]]},
        image_grid_pinpoints=[[32, 288]],
        vision_aspect_ratio="anyres_max_1",
    )
    assert rule.layout("image", 288, 32, 1, {}).num_features > 16
    with pytest.raises(MediaError, match="too narrow"):
        rule.layout("image", 288, 8, 1, {})


def test_absent_keys_take_the_config_class_s_defaults() -> None:
    rule = LlavaOnevisionRule.from_hf({"image_grid_pinpoints": None, "video_token_index": 5}, {}, Tokenizer())
    assert (rule.image_size, rule.patch_size, rule.max_tiles, rule.image_token_id) == (384, 14, 9, 151646)
    assert len(rule.pinpoints) == 36


@pytest.mark.parametrize(
    ("processor", "config", "reason"),
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, {}, "LlavaOnevisionImageProcessor"),
        ({"do_flip": True}, {}, "do_flip"),
        ({"vision_aspect_ratio": "anyres_max_4"}, {}, "allows 4 tiles"),
        ({}, {"vision_aspect_ratio": "anyres"}, "anyres_max_N"),
        ({"num_image_tokens": 17}, {}, "num_image_tokens is 17; the model is built for 16"),
        ({}, {"vision_feature_select_strategy": "default"}, "one feature per patch"),
        ({"image_grid_pinpoints": [[32, 64]]}, {}, "config.json has"),
        ({}, {"video_token_index": 6}, "video_token_index is 6"),
        ({"video_processor": {"do_flip": True}}, {}, "do_flip"),
        ({"video_processor": {"size": {"height": 384, "width": 384}}}, {}, "32 x 32"),
        ({"video_processor": VIDEO | {"image_mean": [0, 0, 0]}}, {}, "normalised"),
        ({"video_processor": VIDEO | {"do_center_crop": True}}, {}, "do_center_crop"),
    ],
)
def test_from_hf_of_what_is_not_implemented_is_refused(
    processor: dict[str, Any], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        make_rule(build_image_processor().to_dict() | processor, **config)


@pytest.mark.parametrize("key", ["vision_aspect_ratio", "num_image_tokens", "image_grid_pinpoints"])
def test_options_that_the_model_is_built_for_are_refused(key: str) -> None:
    with pytest.raises(RequestError, match=f"cannot change {key}"):
        make_rule().layout("image", 100, 100, 1, {key: "other"})


def clip(count: int = 3, **about: Any) -> Clip:
    return Clip(width=90, height=70, num_frames=count, frames=tuple(range(count)), **about)


@pytest.mark.parametrize("count", [1, 3, 32])
def test_num_features_of_videos_equal_hf(count: int) -> None:
    processor = build_processor(build_image_processor(), num_image_tokens=27**2, vision_aspect_ratio="anyres_max_9")
    rule = LlavaOnevisionRule.from_hf({"video_token_index": 5}, {}, Tokenizer())
    layout = rule.video_layout(clip(count), {})
    text = processor.replace_video_token({"pixel_values_videos": [np.empty((count, 3, 384, 384))]}, 0)
    assert layout.num_features == text.count("<video>") == count * 196 + 1
    assert list(rule.expand("video", 1, layout)) == [TokenRun(5, layout.num_features, is_feature=True)]
    assert layout.plan.frames == tuple(range(count))
    assert layout.plan.tile_sizes == [(384, 384)]
    assert layout.num_patches == count * 729


def test_video_samples_as_hf_s_default_does() -> None:
    every = clip(30, fps=10.0)
    rule = make_rule()
    for options in ({"num_frames": 4}, {"fps": 4 / 3}):
        assert rule.video_layout(every, options).plan.frames == (0, 7, 15, 22)
    assert rule.video_layout(every, {"do_sample_frames": True}).plan.frames == tuple(range(30))
    assert rule.video_layout(every, {"image_grid_pinpoints": "any"}).plan.frames == tuple(range(30))  # pictures' own
    for speed in (clip(30, fps=10.0), clip(30, fps=1e-300)):
        with pytest.raises(RequestError, match="too many frames"):
            rule.video_layout(speed, {"fps": 1e308})
    with pytest.raises(RequestError, match="31 frames"):
        rule.video_layout(every, {"num_frames": 31})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_crops": 2}, "num_crops"),
        ({"size": {"height": 40, "width": 40}}, "32 x 32"),
        ({"resample": 9}, "resample"),
    ],
)
def test_video_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_rule().video_layout(clip(), options)


def test_video_s_embedding_is_whole_frames_and_a_newline() -> None:
    rule = make_rule()
    assert rule.embedding_layout("video", 3 * 4 + 1, {}).num_features == 13
    for count in (1, 4, 12, 14):
        with pytest.raises(RequestError, match="4 for each frame"):
            rule.embedding_layout("video", count, {})
    with pytest.raises(RequestError, match="alone"):
        rule.embedding_layout("video", 13, {"video_grid_thw": (3, 2, 2)})


def test_video_without_a_token_for_it_is_refused() -> None:
    rule = make_rule(build_image_processor().to_dict() | {"video_token": "<clip>"})
    assert (rule.max_items("image"), rule.max_items("video")) == (None, 0)
    for ask in (lambda: rule.placeholder("video"), lambda: rule.embedding_layout("video", 13, {})):
        with pytest.raises(RequestError, match="images only"):
            ask()
