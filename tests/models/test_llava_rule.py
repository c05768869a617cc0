"""LLaVA's rule against Hugging Face's Pillow-backed processors: the same pixels, the same number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models.llava.rule import LlavaRule
from opsin.models.rule import Placeholder, TokenRun

CLIP: dict[str, Any] = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14}
SIZE: dict[str, Any] = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}


class Tokenizer:
    def convert_tokens_to_ids(self, token: str) -> int | None:
        return {"<image>": 7, "<picture>": 8}.get(token)


def make_rule(processor: Mapping[str, Any], vision: Mapping[str, Any] = CLIP, **config: Any) -> LlavaRule:
    return LlavaRule.from_hf({"vision_config": vision, "image_token_index": 7} | config, processor, Tokenizer())


def noise(mode: str, width: int, height: int) -> Image.Image:
    """Smooth noise: resampling mistakes show, JPEG-like structure does not matter."""
    rng = np.random.default_rng(width * 10_007 + height)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    if mode == "P+tRNS":
        palette = image.convert("RGB").quantize(17)
        palette.info["transparency"] = bytes([0, 128, 255, 77])
        return palette
    if mode == "P":
        return image.convert("RGB").quantize(17)
    if mode == "CMYK":
        return Image.frombytes("CMYK", image.size, image.tobytes())
    return image.convert(mode)


def our_pixels(rule: LlavaRule, image: Any, options: Mapping[str, Any] | None = None) -> np.ndarray:
    source = open_picture(image, MediaConfig())
    plan = rule.layout("image", *source.size, 1, options or {}).plan
    out = np.full(plan.num_bytes, 99, np.uint8)
    make_tiles(source.decode(), plan, out)
    return out.reshape(rule.image_size, rule.image_size, 3)


def normalized(rule: LlavaRule, image: Any, options: Mapping[str, Any] | None = None) -> np.ndarray:
    """(3, height, width) float32, as the tower sees it."""
    pixels = our_pixels(rule, image, options)
    return np.stack([rule.norm.table()[pixels[:, :, channel], channel] for channel in range(3)])


PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (CLIPImageProcessorPil(**SIZE), CLIP),
    "clip-odd-crop": (CLIPImageProcessorPil(size={"shortest_edge": 71}, crop_size=56), CLIP),
    "clip-crop-larger-than-resize": (CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size=56), CLIP),
    "clip-crop-only": (CLIPImageProcessorPil(do_resize=False, crop_size=56), CLIP),
    "clip-squash": (CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False), CLIP),
    "clip-bilinear": (CLIPImageProcessorPil(**SIZE, resample=2), CLIP),
    "clip-no-rescale": (CLIPImageProcessorPil(**SIZE, do_rescale=False), CLIP),
    "clip-no-normalize": (CLIPImageProcessorPil(**SIZE, do_normalize=False), CLIP),
    "bit": (BitImageProcessorPil(**SIZE), CLIP),
    "siglip": (SiglipImageProcessorPil(size={"height": 56, "width": 56}), SIGLIP),
    "llava": (LlavaImageProcessorPil(**SIZE), CLIP),
    "llava-pad": (LlavaImageProcessorPil(**SIZE, do_pad=True), CLIP),
    "llava-pad-no-crop": (LlavaImageProcessorPil(**SIZE, do_pad=True, do_center_crop=False), CLIP),
}
SIZES = [(1, 1), (1, 40), (300, 2), (56, 56), (57, 55), (33, 101), (200, 113), (113, 200), (55, 57), (641, 480)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_over_sizes_equal_hf(name: str) -> None:
    processor, vision = PROCESSORS[name]
    rule = make_rule(processor.to_dict(), vision)
    for size in SIZES:
        image = noise("RGB", *size)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(normalized(rule, image), expected, err_msg=f"{name} {size}")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "P+tRNS", "CMYK", "I;16", "I", "F", "YCbCr"])
@pytest.mark.parametrize("name", ["clip", "siglip", "llava-pad"])
def test_pixels_over_modes_equal_hf(name: str, mode: str) -> None:
    processor, vision = PROCESSORS[name]
    rule = make_rule(processor.to_dict(), vision)
    image = noise(mode, 61, 83)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(normalized(rule, image), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_of_arrays_equal_hf(channels: int) -> None:
    processor, vision = PROCESSORS["clip"]
    array = np.random.default_rng(0).integers(0, 256, (83, 61, channels), dtype=np.uint8)
    expected = processor(array, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(normalized(make_rule(processor.to_dict(), vision), array), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 64}},
        {"size": {"height": 60, "width": 90}, "crop_size": 56},
        {"do_center_crop": False, "size": [56, 56]},
        {"resample": 0},
        {"do_resize": False},
    ],
)
def test_options_per_request_equal_hf(options: dict[str, Any]) -> None:
    processor, vision = PROCESSORS["clip"]
    image = noise("RGB", 120, 77)
    expected = processor(image, return_tensors="np", **options)["pixel_values"][0]
    np.testing.assert_array_equal(normalized(make_rule(processor.to_dict(), vision), image, options), expected)


def test_pixels_differ_when_the_resampling_differs() -> None:
    processor, vision = PROCESSORS["clip"]
    rule = make_rule(processor.to_dict(), vision)
    image = noise("RGB", 120, 77)
    assert np.abs(normalized(rule, image) - normalized(rule, image, {"resample": 2})).max() > 0.01


@pytest.mark.parametrize(
    ("vision", "strategy", "expected"),
    [(CLIP, "default", 16), (CLIP, "full", 17), (SIGLIP, "full", 16), (SIGLIP, "default", 15)],
)
def test_num_features_follow_tower_and_strategy(vision: Mapping[str, Any], strategy: str, expected: int) -> None:
    rule = make_rule(PROCESSORS["clip"][0].to_dict(), vision, vision_feature_select_strategy=strategy)
    layout = rule.layout("image", 640, 480, 1, {})
    assert (layout.num_features, layout.num_patches) == (expected, 16)
    assert list(rule.expand("image", 1, layout)) == [TokenRun(7, expected, is_feature=True)]


def test_rule_of_llava_1_5_gives_576_features() -> None:
    rule = LlavaRule.from_hf({"image_token_index": 32000}, {"size": 336, "crop_size": 336}, Tokenizer())
    layout = rule.layout("image", 640, 480, 1, {})
    assert (layout.num_features, layout.num_patches, layout.plan.num_bytes) == (576, 576, 336 * 336 * 3)


def test_placeholder_is_cut_from_text_where_the_tokenizer_would_split_it() -> None:
    assert make_rule(SIZE).placeholder("image") == Placeholder("<image>", 7, "<image>")
    assert make_rule(SIZE, image_token_index=32000).placeholder("image").token_id is None
    custom = LlavaRule.from_hf({"vision_config": CLIP}, SIZE | {"image_token": "<picture>"}, Tokenizer())
    assert custom.placeholder("image") == Placeholder("<picture>", 8, "<picture>")


@pytest.mark.parametrize(
    ("processor", "vision", "reason"),
    [
        (SIZE | {"image_processor_type": "PixtralImageProcessor"}, CLIP, "CLIPImageProcessor"),
        (SIZE | {"do_flip": True}, CLIP, "do_flip"),
        (SIZE | {"resample": 5}, CLIP, "resample"),
        (SIZE | {"size": {"longest_edge": 5}}, CLIP, "longest_edge"),
        (SIZE | {"crop_size": {"height": 42, "width": 42}}, CLIP, "takes 56 x 56"),
        (SIZE | {"do_pad": True, "image_processor_type": "CLIPImageProcessor"}, CLIP, "do_pad"),
        (SIZE | {"image_mean": [0.5, 0.5]}, CLIP, "image_mean"),
        (SIZE, CLIP | {"model_type": "pixtral"}, "siglip_vision_model"),
        (SIZE, CLIP | {"image_size": [56, 42]}, "square"),
    ],
)
def test_from_hf_of_what_is_not_implemented_is_refused(
    processor: dict[str, Any], vision: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        make_rule(processor, vision)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_crops": 4}, "num_crops"),
        ({"image_mean": [0, 0, 0]}, "cannot change image_mean"),
        ({"size": "large"}, "size is 'large'"),
        ({"crop_size": 42}, "takes 56 x 56"),
        ({"crop_size": {"shortest_edge": 56}}, "crop_size"),
        ({"size": {"shortest_edge": 0}}, "at least 1"),
        ({"resample": [1]}, r"resample is \[1\]"),
        ({"do_resize": "no"}, "true or false"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_rule(SIZE).layout("image", 100, 100, 1, options)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
@pytest.mark.parametrize("name", ["clip", "llava-pad"])
def test_extreme_aspect_ratio_is_refused_before_it_is_resized(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(MediaError) as caught:
        make_rule(PROCESSORS[name][0].to_dict()).layout("image", *size, 1, {})
    assert caught.value.code == "image_too_small"


def test_video_is_refused() -> None:
    rule = make_rule(SIZE)
    assert (rule.max_items("image"), rule.max_items("video")) == (None, 0)
    with pytest.raises(RequestError, match="images only"):
        rule.layout("video", 100, 100, 8, {})


def test_embedding_layout_makes_no_pixels() -> None:
    layout = make_rule(SIZE).embedding_layout("image", 5, {})
    assert (layout.num_features, layout.plan.views, layout.num_patches) == (5, (), 0)
    with pytest.raises(RequestError, match="image_grid_thw"):
        make_rule(SIZE).embedding_layout("image", 5, {"image_grid_thw": 1})
