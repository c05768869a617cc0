"""Idefics3's and SmolVLM's rule against Hugging Face's Pillow-backed processors: the same tiles, the same tokens."""

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
from opsin.models.idefics3.rule import Idefics3Rule
from tests.factories.idefics3 import FAKE, GLOBAL, IMAGE, Idefics3Shape, build_image_processor, picture_text

EDGE = 32
NUM_FEATURES = 4
NEWLINE, BLANK_LINE = "\u010a", "\u010a\u010a"
VISION: dict[str, Any] = {"image_size": EDGE, "patch_size": 8}
SHAPES = {"idefics3": Idefics3Shape(), "smolvlm": Idefics3Shape(version="smolvlm")}
SIZES = [(1, 1), (1, 40), (2, 300), (300, 2), (32, 32), (64, 64), (65, 63), (96, 32), (33, 101), (200, 113), (640, 481)]
SIZES += [(3000, 2001), (1, 5000), (5000, 1), (95, 96), (97, 95)]


class Tokenizer:
    """Ids by the order of first asking; ``absent`` tokens have none."""

    def __init__(self, *absent: str) -> None:
        self.absent = absent
        self.tokens: list[str] = []

    def convert_tokens_to_ids(self, token: str) -> int | None:
        if token in self.absent:
            return None
        if token not in self.tokens:
            self.tokens.append(token)
        return self.tokens.index(token)


def make_rule(
    processor: Mapping[str, Any] | None = None, tokenizer: Tokenizer | None = None, **config: Any
) -> Idefics3Rule:
    settings = build_image_processor(SHAPES["idefics3"]).to_dict() if processor is None else processor
    return Idefics3Rule.from_hf({"vision_config": VISION} | config, settings, tokenizer or Tokenizer())


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 10_007 + height)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return image.convert(mode)


def normalized(rule: Idefics3Rule, image: Image.Image, options: Mapping[str, Any] | None = None) -> np.ndarray:
    """(tiles, 3, height, width) float32, as the tower sees it."""
    source = open_picture(image, MediaConfig())
    plan = rule.layout("image", *source.size, 1, options or {}).plan
    out = np.full(plan.num_bytes, 99, np.uint8)
    make_tiles(source.decode(), plan, out)
    pixels = out.reshape(-1, EDGE, EDGE, 3)
    return np.stack([rule.norm.table()[pixels[..., channel], channel] for channel in range(3)], axis=1)


@pytest.mark.parametrize("version", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample": 2},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_pad": False},
        {"do_image_splitting": False},
        {"size": {"longest_edge": 180}},
        {"size": {"longest_edge": 20}},
        {"size": {"height": 40, "width": 70}},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    ],
    ids=str,
)
def test_pixels_over_sizes_equal_hf(version: str, settings: dict[str, Any]) -> None:
    processor = build_image_processor(SHAPES[version], **settings)
    rule = make_rule(processor.to_dict())
    for size in SIZES:
        image = noise(*size)
        expected = processor([[image]], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(normalized(rule, image), expected, err_msg=str(size))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "CMYK", "YCbCr"])
def test_pixels_over_modes_equal_hf(mode: str) -> None:
    image = noise(61, 83, "RGB").convert(mode) if mode in ("P", "CMYK", "YCbCr") else noise(61, 83, mode)
    expected = build_image_processor(SHAPES["idefics3"])([[image]], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(normalized(make_rule(), image), expected)


@pytest.mark.parametrize("size", [(40, 100), (192, 100), (32, 31), (150, 64)])
def test_pixels_without_resize_equal_hf(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = build_image_processor(SHAPES["idefics3"])([[image]], return_tensors="np", do_resize=False)
    np.testing.assert_array_equal(normalized(make_rule(), image, {"do_resize": False}), expected["pixel_values"][0])


@pytest.mark.parametrize("blank_line", [True, False], ids=["one-token", "two-tokens"])
@pytest.mark.parametrize("version", SHAPES)
def test_expansion_over_a_grid_of_sizes_spells_hf_s_text(version: str, blank_line: bool) -> None:
    """Whether or not the vocabulary has a token for two newlines."""
    tokenizer = Tokenizer(*([] if blank_line else [BLANK_LINE]))
    rule = make_rule(tokenizer=tokenizer)
    processor = build_image_processor(SHAPES[version])
    sides = [1, 2, 7, 31, 32, 33, 63, 64, 65, 96, 97, 333, 1000]
    for width in sides:
        for height in sides:
            made = processor([[noise(width, height)]], return_row_col_info=True, return_tensors="np")
            layout = rule.layout("image", width, height, 1, {})
            runs = rule.expand("image", 1, layout)
            spelled = "".join(tokenizer.tokens[run.token_id] * run.count for run in runs).replace(NEWLINE, "\n")
            assert spelled == picture_text(version, made, 0, NUM_FEATURES), (width, height)
            assert layout.num_features == sum(run.count for run in runs if run.is_feature)
            assert layout.num_patches == len(layout.plan.tile_sizes) * 16
            assert all(run.is_feature == (tokenizer.tokens[run.token_id] == IMAGE) for run in runs)
    assert (BLANK_LINE in tokenizer.tokens) == blank_line


@pytest.mark.parametrize(
    ("edge", "patch", "scale", "longest"), [(364, 14, 2, 1456), (512, 16, 4, 2048), (384, 14, 3, 1536)]
)
def test_rows_and_columns_of_the_hub_s_checkpoints_equal_hf_at_every_aspect_ratio(
    edge: int, patch: int, scale: int, longest: int
) -> None:
    """Hugging Face's own count of them goes wrong where they are 0; pictures are never so small here."""
    shape = Idefics3Shape(edge=edge, longest_edge=longest)
    processor = build_image_processor(shape)
    vision = {"image_size": edge, "patch_size": patch}
    rule = make_rule(processor.to_dict(), vision_config=vision, scale_factor=scale)
    rng = np.random.default_rng(0)
    for width, height in [(1, 1), (1, 9999), (9999, 1), *rng.integers(1, 4000, (2000, 2)).tolist()]:
        _, *expected = processor.get_number_of_image_patches(height, width, {})
        layout = rule.layout("image", width, height, 1, {})
        assert list(layout.numbers) == expected, (width, height)
        assert layout.num_features == (expected[0] * expected[1] + 1) * (edge // patch // scale) ** 2


def test_picture_of_one_tile_has_an_overview_alone() -> None:
    layout = make_rule().layout("image", 100, 100, 1, {"size": {"longest_edge": 30}})
    assert layout.numbers == (0, 0)
    assert layout.num_features == NUM_FEATURES
    assert len(layout.plan.views) == 1


@pytest.mark.parametrize(
    ("processor", "config", "absent", "reason"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, {}, (), "SmolVLMImageProcessor"),
        ({"do_flip": True}, {}, (), "do_flip"),
        ({"max_image_size": {"longest_edge": 40}}, {}, (), "max_image_size"),
        ({"image_seq_len": 9}, {}, (), "makes 4 features"),
        ({"size": {"shortest_edge": 96}}, {}, (), "longest_edge"),
        ({"size": 96}, {}, (), "longest_edge"),
        ({"resample": 5}, {}, (), "resample"),
        ({"image_mean": [0.5]}, {}, (), "image_mean"),
        ({}, {"scale_factor": 3}, (), "scale_factor"),
        ({}, {"vision_config": {"image_size": EDGE, "patch_size": 40}}, (), "patch_size"),
        ({}, {}, (FAKE,), "fake_token_around_image"),
        ({}, {}, (GLOBAL,), "global-img"),
        ({}, {}, (NEWLINE,), "byte-level"),
    ],
)
def test_from_hf_of_what_is_not_implemented_is_refused(
    processor: dict[str, Any], config: dict[str, Any], absent: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        make_rule(build_image_processor(SHAPES["idefics3"]).to_dict() | processor, Tokenizer(*absent), **config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_crops": 4}, "num_crops"),
        ({"max_image_size": {"longest_edge": 64}}, "cannot change max_image_size"),
        ({"image_mean": [0, 0, 0]}, "cannot change image_mean"),
        ({"size": {"longest_edge": 0}}, "longest_edge"),
        ({"do_image_splitting": 1}, "true or false"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_rule().layout("image", 100, 100, 1, options)


@pytest.mark.parametrize("options", [{"size": {"longest_edge": 200}}, {"do_resize": False}])
def test_picture_of_more_tiles_than_tags_is_refused(options: dict[str, Any]) -> None:
    rule = make_rule()
    assert rule.layout("image", 192, 20, 1, options | {"do_resize": False}).numbers == (1, 6)
    with pytest.raises(MediaError, match="no tags"):
        rule.layout("image", 200, 20, 1, options)


def test_embedding_layout_takes_an_overview_or_all_tiles_of_a_size() -> None:
    rule = make_rule()
    assert rule.embedding_layout("image", NUM_FEATURES, {}).numbers == (0, 0)
    tiled = rule.layout("image", 90, 40, 1, {})
    layout = rule.embedding_layout("image", tiled.num_features, {"image_size": (40, 90)})
    assert (layout.numbers, layout.num_features, layout.plan.views) == (tiled.numbers, tiled.num_features, ())
    assert rule.expand("image", 1, layout) == rule.expand("image", 1, tiled)
    with pytest.raises(RequestError, match="image_sizes"):
        rule.embedding_layout("image", tiled.num_features, {})
    with pytest.raises(RequestError, match="image_grid_thw"):
        rule.embedding_layout("image", NUM_FEATURES, {"image_grid_thw": (1, 2, 2)})


def test_video_is_refused() -> None:
    rule = make_rule()
    assert (rule.max_items("image"), rule.max_items("video")) == (None, 0)
    with pytest.raises(RequestError, match="images only"):
        rule.layout("video", 100, 100, 8, {})
