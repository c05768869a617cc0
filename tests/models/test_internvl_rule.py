"""InternVL's rule against Hugging Face's Pillow-backed processor: grids, pixels, counts, expansion."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import InternVLProcessor
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as hf

from opsin.config import MediaConfig
from opsin.errors import RequestError, UnsupportedModelError
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models.internvl.rule import InternVLRule, tile_grid
from opsin.models.rule import TokenRun

IMAGE, START, END = 7, 8, 9
EDGE = 28
HF_PROCESSOR: Any = hf.GotOcr2ImageProcessorPil  # its stubs refuse its own arguments
CONFIG: dict[str, Any] = {"image_token_id": IMAGE, "vision_config": {"image_size": [EDGE, EDGE], "patch_size": [7, 7]}}
SMALL: dict[str, Any] = {"size": {"height": EDGE, "width": EDGE}}
# As saved by the transformers that wrote the hub's InternVL3 checkpoints, nulls and all.
HUB_PROCESSOR: dict[str, Any] = {
    "crop_size": None,
    "crop_to_patches": False,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_seq_length": 256,
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"height": 448, "width": 448},
}


class Tokenizer:
    def convert_tokens_to_ids(self, token: str) -> int | None:
        return {"<IMG_CONTEXT>": IMAGE, "<img>": START, "</img>": END}.get(token)


def make_rule(processor: Mapping[str, Any] = SMALL, **config: Any) -> InternVLRule:
    return InternVLRule.from_hf(CONFIG | config, processor, Tokenizer())


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 10_007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA").convert(mode)


def our_pixels(rule: InternVLRule, image: Image.Image, options: Mapping[str, Any] | None = None) -> np.ndarray:
    """(tiles, 3, height, width) float32, normalised."""
    layout = rule.layout("image", *image.size, 1, options or {})
    out = np.full(layout.plan.num_bytes, 99, np.uint8)
    make_tiles(open_picture(image, MediaConfig()).decode(), layout.plan, out)
    pixels = out.reshape(-1, rule.tile.edge, rule.tile.edge, 3)
    return np.stack([rule.norm.table()[pixels[..., c], c] for c in range(3)], axis=1)


def assert_equals_hf(rule: InternVLRule, processor: Any, image: Image.Image, options: Mapping[str, Any]) -> None:
    expected = processor(image, return_tensors="np", **(InternVLProcessor.images_kwargs | dict(options)))
    tiles = int(expected["num_patches"][0])
    layout = rule.layout("image", *image.size, 1, options)
    assert layout.num_features == tiles * rule.tile.num_features, image.size
    assert layout.num_patches == tiles * rule.tile.num_patches
    np.testing.assert_array_equal(our_pixels(rule, image, options), expected["pixel_values"], err_msg=str(image.size))


PROCESSORS: dict[str, dict[str, Any]] = {
    "default": SMALL,
    "four": SMALL | {"max_patches": 4},
    "at-least-three": SMALL | {"min_patches": 3, "max_patches": 5},
    "one": SMALL | {"max_patches": 1},
    "exactly-two": SMALL | {"min_patches": 2, "max_patches": 2},
    "bilinear": SMALL | {"resample": 2},
    "no-rescale": SMALL | {"do_rescale": False},
    "no-normalize": SMALL | {"do_normalize": False},
    "no-resize": SMALL | {"do_resize": False},
}
SIZES = [
    *[(1, 1), (1, 40), (3, 3), (5, 3), (300, 2), (1, 999), (28, 28), (29, 28), (42, 41), (14, 70), (33, 101)],
    *[(200, 113), (56, 28), (28, 84), (641, 480), (1000, 1000)],
]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_and_counts_over_sizes_equal_hf(name: str) -> None:
    processor = HF_PROCESSOR(**PROCESSORS[name])
    rule = make_rule(processor.to_dict())
    for size in SIZES:
        assert_equals_hf(rule, processor, noise(*size), {})


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pixels_over_modes_equal_hf(mode: str) -> None:
    image = Image.frombytes("CMYK", (61, 83), noise(61, 83, "RGBA").tobytes()) if mode == "CMYK" else noise(61, 83)
    image = image if mode == "CMYK" else image.convert(mode)
    assert_equals_hf(make_rule(), HF_PROCESSOR(**SMALL), image, {})


@pytest.mark.parametrize(
    "options",
    [
        {"max_patches": 4},
        {"min_patches": 6},
        {"crop_to_patches": False},
        {"resample": 0},
        {"crop_to_patches": False, "do_resize": True, "resample": 1},
        {"size": {"height": EDGE, "width": EDGE}},
        {},
    ],
)
def test_options_per_request_equal_hf(options: dict[str, Any]) -> None:
    assert_equals_hf(make_rule(), HF_PROCESSOR(**SMALL), noise(112, 84), options)


def test_without_resize_a_picture_of_the_tower_s_size_equals_hf() -> None:
    options = {"crop_to_patches": False, "do_resize": False}
    assert_equals_hf(make_rule(), HF_PROCESSOR(**SMALL), noise(EDGE, EDGE), options)
    with pytest.raises(RequestError, match="28 x 28 pixels, not 30 x 28"):
        make_rule().layout("image", 30, 28, 1, options)


def test_tile_grid_over_a_grid_of_sizes_equals_hf() -> None:
    sides = [1, 2, 3, 5, 28, 100, 224, 317, 447, 448, 449, 640, 896, 1023, 1080, 1344, 1920, 4032, 9999, 65535]
    bounds = [(1, 1), (1, 2), (1, 6), (1, 12), (2, 12), (5, 7), (7, 7), (12, 12), (1, 40)]
    grids = set()
    for height, width in itertools.product(sides, sides):
        for (least, most), edge in itertools.product(bounds, (28, 448)):
            ours = tile_grid(width, height, edge, least, most)
            assert ours == hf.get_optimal_tiled_canvas((height, width), (edge, edge), least, most), (height, width)
            grids.add(ours)
    assert len(grids) > 60


def test_rule_of_internvl3_gives_known_counts() -> None:
    rule = make_rule(HUB_PROCESSOR, vision_config={})
    assert rule.tile.num_features == 256
    layout = rule.layout("image", 1024, 768, 1, {})  # 4 x 3 tiles and the whole
    assert (layout.num_features, layout.num_patches) == (13 * 256, 13 * 1024)
    assert [(view.cols, view.rows) for view in layout.plan.views] == [(4, 3), (1, 1)]
    assert rule.layout("image", 448, 448, 1, {}).num_features == 256
    assert rule.layout("image", 40_000, 30_000, 1, {}).plan.num_bytes == 13 * 448 * 448 * 3
    assert rule.norm.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (200, 113), (84, 28)])
def test_expansion_equals_hf(size: tuple[int, int]) -> None:
    rule = make_rule()
    made = HF_PROCESSOR(**SMALL)(noise(*size), return_tensors="np", crop_to_patches=True)
    processor: Any = SimpleNamespace(
        image_token="c", start_image_token="s", end_image_token="e", image_seq_length=rule.tile.num_features
    )
    expected = InternVLProcessor.replace_image_token(processor, dict(made), 0)
    runs = [run for run in rule.expand("image", 1, rule.layout("image", *size, 1, {})) if isinstance(run, TokenRun)]
    letters = {IMAGE: "c", START: "s", END: "e"}
    assert "".join(letters[run.token_id] * run.count for run in runs) == expected
    assert [run.is_feature for run in runs] == [False, True, False]
    assert runs[0] == TokenRun(START)


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 16), (0.5, 4), (0.25, 1), (None, 4)])
def test_features_of_a_tile_follow_the_downsample_ratio(ratio: float | None, expected: int) -> None:
    assert make_rule(downsample_ratio=ratio).tile.num_features == expected


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("processor", "config", "reason"),
    [
        (SMALL | {"image_processor_type": "CLIPImageProcessor"}, {}, "GotOcr2ImageProcessor"),
        (SMALL | {"do_flip": True}, {}, "do_flip"),
        (SMALL | {"do_center_crop": True}, {}, "do_center_crop"),
        (SMALL | {"resample": 5}, {}, "resample"),
        (SMALL | {"image_mean": [0.5, 0.5]}, {}, "image_mean"),
        (SMALL | {"min_patches": 13}, {}, "min_patches is 13"),
        (SMALL | {"min_patches": 0}, {}, "min_patches is 0"),
        (SMALL | {"max_patches": 10**6}, {}, "max_patches 1000000"),
        (SMALL | {"image_seq_length": 256}, {}, "image_seq_length is 256"),
        ({"size": {"height": 56, "width": 56}}, {}, "the model is built for {'height': 28"),
        ({}, {}, "384"),
        (SMALL, {"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        (SMALL, {"downsample_ratio": 0}, "downsample_ratio is 0"),
        (SMALL, {"vision_config": {"image_size": [28, 56], "patch_size": 7}}, "only squares"),
        (SMALL, {"vision_config": {"image_size": 28, "patch_size": 28}}, "divide the tile"),
        (SMALL, {"image_token_id": 6}, "image_token_id"),
    ],
)
def test_from_hf_of_what_is_not_implemented_is_refused(
    processor: dict[str, Any], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        make_rule(processor, **config)


def test_from_hf_without_the_tags_is_refused() -> None:
    class Untagged(Tokenizer):
        def convert_tokens_to_ids(self, token: str) -> int | None:
            return None if token == "</img>" else super().convert_tokens_to_ids(token)

    with pytest.raises(UnsupportedModelError, match="lacks </img>"):
        InternVLRule.from_hf(CONFIG, SMALL, Untagged())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"frames": 2}, "unknown keys: frames"),
        ({"image_mean": [0, 0, 0]}, "cannot change image_mean"),
        ({"size": {"height": 56, "width": 56}}, "cannot change size"),
        ({"max_patches": "many"}, "max_patches 'many'"),
        ({"max_patches": 0}, "max_patches 0"),
        ({"max_patches": 10**9}, "max_patches 1000000000"),
        ({"min_patches": True}, "min_patches is True"),
        ({"min_patches": 5, "max_patches": 4}, "1 <= min_patches <= max_patches"),
        ({"resample": 5}, "resample"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_rule().layout("image", 100, 100, 1, options)


def test_video_without_a_token_for_it_is_refused() -> None:
    rule = make_rule()
    assert (rule.max_items("image"), rule.max_items("video")) == (None, 0)
    for refuse in (
        lambda: rule.layout("video", 100, 100, 8, {}),
        lambda: rule.placeholder("video"),
        lambda: rule.embedding_layout("video", 4, {}),
    ):
        with pytest.raises(RequestError, match="images only"):
            refuse()


def test_placeholder_is_the_context_token_alone() -> None:
    sign = make_rule().placeholder("image")
    assert (sign.text, sign.token_id, sign.pattern) == ("<IMG_CONTEXT>", IMAGE, "<IMG_CONTEXT>")


def test_embedding_layout_takes_whole_tiles_alone() -> None:
    rule = make_rule()
    layout = rule.embedding_layout("image", 12, {})
    assert (layout.num_features, layout.plan.views, layout.num_patches) == (12, (), 0)
    with pytest.raises(RequestError, match="whole tiles of 4"):
        rule.embedding_layout("image", 10, {})
    with pytest.raises(RequestError, match="image_sizes"):
        rule.embedding_layout("image", 12, {"image_sizes": [(1, 1)]})
