"""Pixtral's and Mistral 3's rule against Hugging Face's Pillow-backed processor: the same pixels, the same tokens."""

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
from opsin.models import resolve
from opsin.models.mistral3.rule import Mistral3Rule
from tests.factories.mistral3 import BREAK, END, IMAGE, PATCH_SIZE, build_image_processor, picture_text

TOKENS = [IMAGE, BREAK, END]
UNITS = {"mistral3": 2 * PATCH_SIZE, "llava": PATCH_SIZE}  # model type: edge of a feature, in pixels
SIZES = [(1, 1), (1, 40), (90, 2), (32, 32), (64, 64), (65, 63), (96, 32), (97, 96), (33, 101), (200, 113), (640, 481)]
SIZES += [(300, 7)]
HUGE = (3000, 2001)


class Tokenizer:
    """``absent`` tokens have no id."""

    def __init__(self, *absent: str) -> None:
        self.absent = absent

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return TOKENS.index(token) if token in TOKENS and token not in self.absent else None


def make_rule(
    processor: Mapping[str, Any] | None = None,
    model_type: str = "mistral3",
    tokenizer: Tokenizer | None = None,
    **config: Any,
) -> Mistral3Rule:
    base = {"model_type": model_type, "vision_config": {"model_type": "pixtral", "patch_size": PATCH_SIZE}}
    settings = build_image_processor().to_dict() if processor is None else processor
    return Mistral3Rule.from_hf(base | config, settings, tokenizer or Tokenizer())


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 10_007 + height)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return image.convert(mode)


def normalized(rule: Mistral3Rule, image: Image.Image, options: Mapping[str, Any] | None = None) -> np.ndarray:
    """(3, height, width) float32, as the tower sees it."""
    source = open_picture(image, MediaConfig())
    plan = rule.layout("image", *source.size, 1, options or {}).plan
    out = np.full(plan.num_bytes, 99, np.uint8)
    make_tiles(source.decode(), plan, out)
    pixels = out.reshape(*plan.tile_sizes[0], 3)
    return np.stack([rule.norm.table()[pixels[..., channel], channel] for channel in range(3)])


@pytest.mark.parametrize("model_type", UNITS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample": 2},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_pad": False},
        {"size": {"longest_edge": 100}},
        {"size": {"height": 40, "width": 70}},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    ],
    ids=str,
)
def test_pixels_and_tokens_over_sizes_equal_hf(model_type: str, settings: dict[str, Any]) -> None:
    processor = build_image_processor(**settings)
    rule = make_rule(processor.to_dict(), model_type)
    for size in SIZES if settings else [*SIZES, HUGE]:
        image = noise(size[0], size[1])
        made = processor([image], return_tensors="np", patch_size=UNITS[model_type])
        np.testing.assert_array_equal(normalized(rule, image), made["pixel_values"][0], err_msg=str(size))
        layout = rule.layout("image", size[0], size[1], 1, {})
        runs = rule.expand("image", 1, layout)
        spelled = "".join(TOKENS[run.token_id] * run.count for run in runs)
        assert spelled == picture_text(made["image_sizes"][0], UNITS[model_type]), size
        assert layout.num_features == sum(run.count for run in runs if run.is_feature)
        assert layout.num_patches == made["pixel_values"][0][0].size // PATCH_SIZE**2
        assert all(run.is_feature == (TOKENS[run.token_id] == IMAGE) for run in runs)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "CMYK", "YCbCr"])
def test_pixels_over_modes_equal_hf(mode: str) -> None:
    image = noise(61, 83, "RGB").convert(mode) if mode in ("P", "CMYK", "YCbCr") else noise(61, 83, mode)
    expected = build_image_processor()([image], return_tensors="np", patch_size=16)["pixel_values"][0]
    np.testing.assert_array_equal(normalized(make_rule(), image), expected)


@pytest.mark.parametrize(
    "options", [{"resample": 0}, {"do_pad": False}, {"size": {"longest_edge": 48}}, {"do_resize": False}]
)
def test_options_per_request_equal_hf(options: dict[str, Any]) -> None:
    image = noise(128, 64)
    expected = build_image_processor()([image], return_tensors="np", patch_size=16, **options)["pixel_values"][0]
    np.testing.assert_array_equal(normalized(make_rule(), image, options), expected)


def test_num_features_of_the_hub_s_checkpoints_at_common_sizes() -> None:
    """By hand: 640 x 480 pixels are 46 x 35 features of 14 pixels, two by two."""
    settings = {"size": {"longest_edge": 1540}}
    small = make_rule(settings, vision_config={"patch_size": 14}, spatial_merge_size=2)
    assert small.layout("image", 640, 480, 1, {}).numbers == (18, 23)
    assert small.layout("image", 4032, 3024, 1, {}).numbers == (42, 55)
    pixtral = make_rule({}, "llava", vision_config={"model_type": "pixtral"})
    assert pixtral.layout("image", 640, 480, 1, {}).numbers == (30, 40)
    assert pixtral.layout("image", 4032, 3024, 1, {}).numbers == (48, 64)


def test_mistral3_without_a_vision_config_takes_its_config_class_s() -> None:
    assert make_rule(vision_config=None).geometry.unit == 28


@pytest.mark.parametrize("tower", ["pixtral", "clip_vision_model", None])
def test_llava_with_a_pixtral_tower_alone_is_this_family(tower: str | None) -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"model_type": tower}}
    assert (resolve(config).load_rule() is Mistral3Rule) == (tower == "pixtral")


def test_picture_that_would_vanish_is_refused() -> None:
    rule = make_rule()
    assert rule.layout("image", 96, 1, 1, {}).numbers == (1, 6)
    with pytest.raises(MediaError, match="too narrow"):
        rule.layout("image", 97, 1, 1, {})


@pytest.mark.parametrize(
    ("processor", "config", "absent", "reason"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, {}, (), "PixtralImageProcessor"),
        ({"do_center_crop": True}, {}, (), "do_center_crop"),
        ({"size": {"shortest_edge": 96}}, {}, (), "longest_edge"),
        ({"size": 96}, {}, (), "longest_edge"),
        ({"resample": 5}, {}, (), "resample"),
        ({"image_std": [0.5]}, {}, (), "image_std"),
        ({"spatial_merge_size": 4}, {}, (), "spatial_merge_size is 4; the model is built for 2"),
        ({}, {"spatial_merge_size": 0}, (), "spatial_merge_size 0"),
        ({}, {"vision_config": {"patch_size": [8, 8]}}, (), "patch_size"),
        ({}, {}, (BREAK,), "IMG_BREAK"),
        ({}, {}, (END,), "IMG_END"),
        ({}, {}, (IMAGE,), "IMG"),
    ],
)
def test_from_hf_of_what_is_not_implemented_is_refused(
    processor: dict[str, Any], config: dict[str, Any], absent: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        make_rule(build_image_processor().to_dict() | processor, tokenizer=Tokenizer(*absent), **config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_crops": 4}, "num_crops"),
        ({"spatial_merge_size": 1}, "cannot change spatial_merge_size"),
        ({"image_mean": [0, 0, 0]}, "cannot change image_mean"),
        ({"size": {"longest_edge": 0}}, "longest_edge"),
        ({"do_resize": False}, "multiples of 16"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_rule().layout("image", 100, 100, 1, options)


def test_embedding_layout_ends_rows_by_the_picture_s_size() -> None:
    rule = make_rule()
    made = rule.layout("image", 90, 40, 1, {})
    for size in ((40, 90), (48, 96)):  # of the picture, or as Hugging Face's processor made it
        layout = rule.embedding_layout("image", made.num_features, {"image_sizes": size})
        assert (layout.numbers, layout.plan.views, layout.num_patches) == (made.numbers, (), 0)
        assert rule.expand("image", 1, layout) == rule.expand("image", 1, made)
    with pytest.raises(RequestError, match="has 18 features"):
        rule.embedding_layout("image", 17, {"image_sizes": (40, 90)})
    with pytest.raises(RequestError, match="image_sizes"):
        rule.embedding_layout("image", 18, {})
    with pytest.raises(RequestError, match="image_grid_thw"):
        rule.embedding_layout("image", 18, {"image_grid_thw": (1, 3, 6)})


def test_video_is_refused() -> None:
    rule = make_rule()
    assert (rule.max_items("image"), rule.max_items("video")) == (None, 0)
    with pytest.raises(RequestError, match="images only"):
        rule.layout("video", 100, 100, 8, {})
