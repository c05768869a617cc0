"""LLaVA-NeXT's rule against Hugging Face's Pillow-backed processor: the same tiles, the same number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel as HFModel

from opsin.config import MediaConfig
from opsin.errors import RequestError, UnsupportedModelError
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models.llava_next.model import feature_order
from opsin.models.llava_next.rule import LlavaNextRule
from opsin.models.rule import TokenRun
from tests.factories.llava_next import PINPOINTS, TILE, build_processor
from tests.factory import LlavaShape

CLIP: dict[str, Any] = {"model_type": "clip_vision_model", "image_size": TILE, "patch_size": 8}
SIGLIP: dict[str, Any] = CLIP | {"model_type": "siglip_vision_model"}
GRID = TILE // 8
PROCESSOR: dict[str, Any] = build_processor(LlavaShape()).image_processor.to_dict()
SIZES = [(1, 1), (1, 40), (2, 300), (300, 2), (32, 32), (64, 64), (65, 63), (96, 32), (33, 101), (200, 113), (640, 481)]
HUGE = (3000, 2001)
NARROW = [(1, 5000), (5000, 1)]


class Tokenizer:
    def convert_tokens_to_ids(self, token: str) -> int | None:
        return {"<image>": 4}.get(token)


def make_rule(processor: Mapping[str, Any] = PROCESSOR, **config: Any) -> LlavaNextRule:
    base = {"vision_config": CLIP, "image_token_index": 4, "image_grid_pinpoints": [list(p) for p in PINPOINTS]}
    return LlavaNextRule.from_hf(base | config, processor, Tokenizer())


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 10_007 + height)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return image.convert(mode)


def normalized(rule: LlavaNextRule, image: Image.Image, options: Mapping[str, Any] | None = None) -> np.ndarray:
    """(tiles, 3, height, width) float32, as the tower sees it."""
    source = open_picture(image, MediaConfig())
    plan = rule.layout("image", *source.size, 1, options or {}).plan
    out = np.full(plan.num_bytes, 99, np.uint8)
    make_tiles(source.decode(), plan, out)
    pixels = out.reshape(-1, TILE, TILE, 3)
    return np.stack([rule.norm.table()[pixels[..., channel], channel] for channel in range(3)], axis=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample": 2},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_resize": False},
        {"do_center_crop": False, "do_pad": False},
        {"size": {"height": TILE, "width": TILE}},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"image_grid_pinpoints": [[TILE, TILE], [4 * TILE, 4 * TILE], [TILE, 5 * TILE]]},
    ],
    ids=str,
)
def test_pixels_over_sizes_equal_hf(settings: dict[str, Any]) -> None:
    processor = build_processor(LlavaShape(), **settings).image_processor
    rule = make_rule(processor.to_dict(), image_grid_pinpoints=processor.image_grid_pinpoints)
    for size in SIZES:
        image = noise(*size)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(normalized(rule, image), expected, err_msg=str(size))


@pytest.mark.parametrize("size", [HUGE, *NARROW])
def test_pixels_of_huge_and_narrow_pictures_equal_hf(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = build_processor(LlavaShape()).image_processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(normalized(make_rule(), image), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "CMYK", "YCbCr"])
def test_pixels_over_modes_equal_hf(mode: str) -> None:
    image = noise(61, 83, "RGB").convert(mode) if mode in ("P", "CMYK", "YCbCr") else noise(61, 83, mode)
    expected = build_processor(LlavaShape()).image_processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(normalized(make_rule(), image), expected)


@pytest.mark.parametrize(
    "options", [{"resample": 0}, {"do_pad": False}, {"do_resize": False}, {"size": [TILE, TILE]}, {"crop_size": TILE}]
)
def test_options_per_request_equal_hf(options: dict[str, Any]) -> None:
    image = noise(120, 77)
    expected = build_processor(LlavaShape()).image_processor(image, return_tensors="np", **options)
    np.testing.assert_array_equal(normalized(make_rule(), image, options), expected["pixel_values"][0])


def test_pixels_differ_when_the_resampling_differs() -> None:
    image = noise(120, 77)
    assert np.abs(normalized(make_rule(), image) - normalized(make_rule(), image, {"resample": 2})).max() > 0.01


def test_num_features_over_a_grid_of_sizes_equal_hf() -> None:
    processor = build_processor(LlavaShape())
    rule = make_rule()
    sides = [1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 333, 1000, 4097, 100_000]
    for width in sides:
        for height in sides:
            layout = rule.layout("image", width, height, 1, {})
            expected = processor._get_number_of_features(height, width, TILE, TILE) - 1
            assert layout.num_features == expected, (width, height)
            assert layout.num_patches == len(layout.plan.tile_sizes) * GRID**2
            assert list(rule.expand("image", 1, layout)) == [TokenRun(4, expected, is_feature=True)]


def test_num_features_of_llava_1_6_equal_hf_at_every_aspect_ratio() -> None:
    """With the hub's tower and pinpoints. The first ones keep a whole number of patches but for a float's error."""
    config = {"image_token_index": 4}
    rule = LlavaNextRule.from_hf(config, {"size": {"shortest_edge": 336}, "crop_size": 336}, Tokenizer())
    processor = build_processor(LlavaShape(), image_grid_pinpoints=[list(p) for p in rule.pinpoints])
    processor.patch_size = 14
    rng = np.random.default_rng(0)
    sizes = [(55, 88), (99, 88), (176, 55), (205, 984), (328, 861), *rng.integers(1, 4000, (3000, 2)).tolist()]
    for width, height in sizes:
        expected = processor._get_number_of_features(height, width, 336, 336) - 1
        assert rule.layout("image", width, height, 1, {}).num_features == expected, (width, height)
    assert rule.layout("image", 640, 480, 1, {}).num_features == 576 + 36 * 49


def hf_order(rule: LlavaNextRule, sizes: list[tuple[int, int]]) -> np.ndarray:
    """``pack_image_features`` of features that are their own numbers, the newline being the last one."""
    layouts = [rule.layout("image", *size, 1, {}) for size in sizes]
    tiles = [len(layout.plan.tile_sizes) for layout in layouts]
    numbers = torch.arange(sum(tiles) * GRID**2, dtype=torch.float64).view(-1, GRID**2, 1)
    model: Any = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=TILE, patch_size=8),
            image_grid_pinpoints=[list(p) for p in rule.pinpoints],
        )
    )
    pack: Any = HFModel.pack_image_features
    packed, lens = pack(
        model,
        numbers.split(tiles),
        torch.tensor([(height, width) for width, height in sizes]),
        "default",
        image_newline=torch.tensor([float(numbers.numel())], dtype=torch.float64),
    )
    assert lens.tolist() == [layout.num_features for layout in layouts]
    return torch.cat(packed).squeeze(-1).long().numpy()


def test_feature_order_of_packed_pictures_equals_hf() -> None:
    rule = make_rule()
    sizes: list[tuple[int, int]] = [*SIZES, *NARROW, HUGE, (100, 37), (37, 100)]
    layouts = [rule.layout("image", *size, 1, {}) for size in sizes]
    np.testing.assert_array_equal(feature_order(layouts, GRID), hf_order(rule, sizes))


def test_layout_of_a_wide_picture_cuts_rows_that_see_padding() -> None:
    layout = make_rule().layout("image", 64, 20, 1, {})
    assert layout.numbers == (1, 2, 1, 0)
    assert layout.num_features == 16 + 2 * (8 + 1)


def test_layout_of_narrow_pictures_keeps_the_overview_at_least() -> None:
    rule = make_rule()
    assert rule.layout("image", 100_000, 1, 1, {}).num_features == 16  # no row is left of the mosaic
    assert rule.layout("image", 1, 100_000, 1, {}).num_features == 16 + 4  # newlines alone are


@pytest.mark.parametrize(
    ("processor", "config", "reason"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, {}, "LlavaNextImageProcessor"),
        ({"do_flip": True}, {}, "do_flip"),
        ({"aspect_ratio_setting": "pad"}, {}, "anyres"),
        ({"resample": 5}, {}, "resample"),
        ({"size": {"shortest_edge": 40}}, {}, "takes 32 x 32"),
        ({"crop_size": {"height": 32, "width": 40}}, {}, "takes 32 x 32"),
        ({"crop_size": {"shortest_edge": 32}}, {}, "height and a width"),
        ({"image_grid_pinpoints": [[32, 64]]}, {}, "config.json has"),
        ({"image_grid_pinpoints": [[32, 65]]}, {"image_grid_pinpoints": [[32, 65]]}, "multiples"),
        ({"image_grid_pinpoints": [32, 64]}, {"image_grid_pinpoints": [32, 64]}, "multiples"),
        ({"image_grid_pinpoints": "any"}, {"image_grid_pinpoints": "any"}, "multiples"),
        ({"image_mean": [0.5]}, {}, "image_mean"),
        ({}, {"vision_config": CLIP | {"model_type": "pixtral"}}, "siglip_vision_model"),
        ({}, {"vision_feature_select_strategy": "full"}, "one feature per patch"),
        ({}, {"vision_config": SIGLIP}, "one feature per patch"),
    ],
)
def test_from_hf_of_what_is_not_implemented_is_refused(
    processor: dict[str, Any], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        make_rule(PROCESSOR | processor, **config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_crops": 4}, "num_crops"),
        ({"image_grid_pinpoints": [[32, 32]]}, "cannot change image_grid_pinpoints"),
        ({"image_mean": [0, 0, 0]}, "cannot change image_mean"),
        ({"crop_size": 40}, "takes 32 x 32"),
        ({"resample": 9}, "resample"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_rule().layout("image", 100, 100, 1, options)


def test_video_is_refused() -> None:
    rule = make_rule()
    assert (rule.max_items("image"), rule.max_items("video")) == (None, 0)
    with pytest.raises(RequestError, match="images only"):
        rule.layout("video", 100, 100, 8, {})


def test_embedding_layout_counts_features_where_the_size_is_known() -> None:
    rule = make_rule()
    assert rule.embedding_layout("image", 5, {}).num_features == 5
    layout = rule.embedding_layout("image", 34, {"image_sizes": (20, 64)})
    assert (layout.num_features, layout.plan.views, layout.num_patches) == (34, (), 0)
    with pytest.raises(RequestError, match="has 34 features"):
        rule.embedding_layout("image", 33, {"image_sizes": (20, 64)})
    with pytest.raises(RequestError, match="image_grid_thw"):
        rule.embedding_layout("image", 34, {"image_grid_thw": (1, 2, 2)})


def test_siglip_with_all_its_rows_has_a_feature_per_patch() -> None:
    rule = make_rule(vision_config=SIGLIP, vision_feature_select_strategy="full")
    assert rule.layout("image", 64, 64, 1, {}).num_features == 16 + 8 * 9
