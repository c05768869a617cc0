"""Qwen2-VL's rule against Hugging Face's Pillow-backed processor and its rope index: pixels, grids, positions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models.qwen2_vl.rule import Qwen2VLRule
from opsin.models.rule import TokenRun
from opsin.models.smart_resize import smart_resize
from opsin.types import MediaItem

PAD = 7
HF_PROCESSOR: Any = hf.Qwen2VLImageProcessorPil  # its stubs refuse its own arguments
CONFIG: dict[str, Any] = {"image_token_id": PAD, "vision_config": {}}
SMALL: dict[str, Any] = {"size": {"shortest_edge": 28 * 28, "longest_edge": 40 * 28 * 28}}


class Tokenizer:
    def convert_tokens_to_ids(self, token: str) -> int | None:
        return {"<|image_pad|>": PAD}.get(token)


def make_rule(processor: Mapping[str, Any] = SMALL, vision: Mapping[str, Any] | None = None) -> Qwen2VLRule:
    return Qwen2VLRule.from_hf(CONFIG | {"vision_config": vision or {}}, processor, Tokenizer())


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 10_007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA").convert(mode)


def our_patches(rule: Qwen2VLRule, image: Image.Image, options: Mapping[str, Any] | None = None) -> np.ndarray:
    """(P, 3 * 2 * patch**2) float32 in merge order, both frames, as Hugging Face lays them out."""
    layout = rule.layout("image", *image.size, 1, options or {})
    out = np.full(layout.plan.num_bytes, 99, np.uint8)
    make_tiles(open_picture(image, MediaConfig()).decode(), layout.plan, out)
    _, rows, cols = layout.numbers
    size, merge = rule.patch_size, rule.merge_size
    pixels = out.reshape(rows * size, cols * size, 3)
    normal = np.stack([rule.norm.table()[pixels[..., c], c] for c in range(3)])  # 3, height, width
    grid = normal.reshape(3, rows // merge, merge, size, cols // merge, merge, size).transpose(1, 4, 2, 5, 0, 3, 6)
    return np.repeat(grid[:, :, :, :, :, None], 2, axis=5).reshape(rows * cols, -1)


def assert_equals_hf(rule: Qwen2VLRule, processor: Any, image: Image.Image, options: Mapping[str, Any]) -> None:
    expected = processor(image, return_tensors="np", **options)
    layout = rule.layout("image", *image.size, 1, options)
    assert layout.numbers == tuple(expected["image_grid_thw"][0]), image.size
    assert layout.num_patches == len(expected["pixel_values"])
    assert layout.num_features == len(expected["pixel_values"]) // 4
    np.testing.assert_array_equal(our_patches(rule, image, options), expected["pixel_values"], err_msg=str(image.size))


PROCESSORS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "bilinear": SMALL | {"resample": 2},
    "no-rescale": SMALL | {"do_rescale": False},
    "no-normalize": SMALL | {"do_normalize": False},
    "grown": {"size": {"shortest_edge": 30 * 28 * 28, "longest_edge": 60 * 28 * 28}},
    "named": {"min_pixels": 28 * 28, "max_pixels": 9 * 28 * 28},
}
SIZES = [(1, 1), (1, 40), (300, 2), (28, 28), (42, 41), (14, 70), (33, 101), (200, 113), (55, 57), (641, 480)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_and_grids_over_sizes_equal_hf(name: str) -> None:
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
        {"size": {"shortest_edge": 784, "longest_edge": 7840}},
        {"size": {"shortest_edge": 78400, "longest_edge": 100_000}},
        {"resample": 0},
        {"do_resize": False},
        {},
    ],
)
def test_options_per_request_equal_hf(options: dict[str, Any]) -> None:
    assert_equals_hf(make_rule(), HF_PROCESSOR(**SMALL), noise(112, 84), options)


@pytest.mark.parametrize("options", [{"min_pixels": 78400}, {"max_pixels": 7840}, {"min_pixels": 50, "max_pixels": 99}])
def test_pixel_bounds_by_name_equal_hf_built_with_them(options: dict[str, Any]) -> None:
    """Hugging Face takes the names in a call too, but deprecates that."""
    rule, image = make_rule(), noise(112, 77)
    processor = HF_PROCESSOR(size=dict(SMALL["size"]), **options)  # it changes the dict that it is given
    expected = processor(image, return_tensors="np")
    np.testing.assert_array_equal(our_patches(rule, image, options), expected["pixel_values"])


def test_pixel_bounds_of_a_request_override_those_named_in_the_config() -> None:
    rule = make_rule({"min_pixels": 784, "max_pixels": 7840})
    assert rule.layout("image", 500, 500, 1, {}).num_features == 9
    size = {"shortest_edge": 784, "longest_edge": 784 * 100}
    assert rule.layout("image", 500, 500, 1, {"size": size}).num_features == 100


def test_smart_resize_over_a_grid_of_sizes_equals_hf() -> None:
    sides = [1, 2, 5, 13, 14, 27, 28, 29, 42, 56, 70, 99, 100, 224, 333, 640, 1023, 1080, 1920, 4032, 9999]
    bounds = [(1, 10), (3136, 1003520), (3136, 12845056), (784, 784), (200_000, 100_000), (10_000, 10_100)]
    checked = 0
    for height, width in itertools.product(sides, sides):
        if max(height, width) / min(height, width) > 200:
            continue
        for (least, most), unit in itertools.product(bounds, (28, 32)):
            ours = smart_resize(width, height, unit, least, most)
            assert ours[::-1] == hf.smart_resize(height, width, unit, least, most), (height, width, least, most, unit)
            checked += 1
    assert checked > 4000


@pytest.mark.parametrize(
    ("size", "refused"), [((200, 1), False), ((201, 1), True), ((3, 601), True), ((3, 600), False)]
)
def test_extreme_aspect_ratio_is_refused_where_hf_refuses(size: tuple[int, int], refused: bool) -> None:
    width, height = size
    if not refused:
        hf.smart_resize(height, width)
        assert make_rule().layout("image", width, height, 1, {}).num_features > 0
        return
    with pytest.raises(ValueError, match="aspect ratio"):
        hf.smart_resize(height, width)
    with pytest.raises(MediaError, match="200 times") as caught:
        make_rule().layout("image", width, height, 1, {})
    assert caught.value.code == "image_too_small"


def test_huge_picture_is_bounded_by_max_pixels_and_absurd_growth_is_refused() -> None:
    rule = make_rule({"min_pixels": 3136, "max_pixels": 12845056})
    assert rule.layout("image", 40_000, 30_000, 1, {}).plan.num_bytes <= 3 * 12845056
    with pytest.raises(MediaError):
        rule.layout("image", 100, 100, 1, {"min_pixels": 10**12, "max_pixels": 10**12})


def test_rule_of_qwen2_vl_gives_known_counts() -> None:
    """As the hub's preprocessor_config.json has it; 1024 x 768 pixels are known to make 1036 x 756."""
    processor = {"min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor"}
    layout = make_rule(processor).layout("image", 1024, 768, 1, {})
    assert (layout.numbers, layout.num_patches, layout.num_features) == ((1, 54, 74), 3996, 999)
    assert list(make_rule().expand("image", 1, layout)) == [TokenRun(PAD, 999, is_feature=True)]


# ----------------------------------------------------------------------------------------------- positions


def hf_model(version: str) -> Any:
    text = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 0}
    text |= {"vocab_size": 10, "intermediate_size": 8, "bos_token_id": None, "eos_token_id": None}
    if version == "2":
        vision = {"depth": 0, "embed_dim": 8, "num_heads": 1, "hidden_size": 8}
        return Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision))
    vision = {"depth": 0, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 8}
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def prompt_of(rule: Qwen2VLRule, pieces: Sequence[int | tuple[int, int]]) -> tuple[list[int], list[MediaItem]]:
    """Token ids and items; an integer is so many text tokens, a pair is a picture's (width, height)."""
    ids: list[int] = []
    items: list[MediaItem] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids += [1] * piece
            continue
        items.append(MediaItem(b"", "image", rule.layout("image", *piece, 1, {})))
        ids += [PAD] * items[-1].layout.num_features
    return ids, items


@pytest.mark.parametrize("version", ["2", "2.5"])
@pytest.mark.parametrize(
    "pieces",
    [
        [5, (200, 113), 4],
        [(56, 56), 1],
        [3, (300, 20)],
        [1, (20, 300), 2, (640, 480), 1, (28, 28), 30, (100, 100), 5],
        [2, (28, 28), 1],
    ],
)
def test_positions_equal_hf_rope_index(version: str, pieces: Sequence[Any]) -> None:
    rule = make_rule()
    ids, items = prompt_of(rule, pieces)
    types = (torch.tensor([ids]) == PAD).int()
    grids = torch.tensor([item.layout.numbers for item in items])
    expected, deltas = hf_model(version).get_rope_index(torch.tensor([ids]), types, image_grid_thw=grids)
    positions = rule.positions(ids, items)
    assert positions is not None
    assert [list(axis) for axis in positions.axes] == expected[:, 0].tolist()
    assert positions.delta == deltas.item()


def test_positions_of_adjacent_pictures_are_each_picture_s_own() -> None:
    rule = make_rule()
    ids, items = prompt_of(rule, [1, (56, 28), (28, 56)])
    positions = rule.positions(ids, items)
    assert positions is not None
    assert [list(axis) for axis in positions.axes] == [[0, 1, 1, 3, 3], [0, 1, 1, 3, 4], [0, 1, 2, 3, 3]]
    assert positions.delta == 0


def test_positions_of_text_alone_are_sequential() -> None:
    assert make_rule().positions([1, 2, 3], []) is None


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("processor", "vision", "reason"),
    [
        (SMALL | {"image_processor_type": "CLIPImageProcessor"}, {}, "Qwen2VLImageProcessor"),
        (SMALL | {"do_flip": True}, {}, "do_flip"),
        (SMALL | {"resample": 5}, {}, "resample"),
        ({"size": {"longest_edge": 5}}, {}, "longest_edge"),
        ({"size": {"height": 5, "width": 5}}, {}, "height"),
        (SMALL | {"min_pixels": 0}, {}, "min_pixels 0"),
        (SMALL | {"image_mean": [0.5, 0.5]}, {}, "image_mean"),
        (SMALL | {"patch_size": 16}, {}, "patch_size is 16; the model is built for 14"),
        (SMALL, {"spatial_merge_size": 4}, "merge_size is 2; the model is built for 4"),
    ],
)
def test_from_hf_of_what_is_not_implemented_is_refused(
    processor: dict[str, Any], vision: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        make_rule(processor, vision)


@pytest.mark.parametrize("config", [{"image_token_id": 8}, {"image_token_id": None}])
def test_from_hf_with_another_placeholder_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="image_token_id"):
        Qwen2VLRule.from_hf(config, SMALL, Tokenizer())


def test_from_hf_of_old_saved_sizes_is_read() -> None:
    """transformers 4.4x saved the bounds three times over."""
    bounds = {"min_pixels": 784, "max_pixels": 7840}
    rule = make_rule(bounds | {"size": dict(bounds)})
    expected = HF_PROCESSOR(**bounds, size=dict(bounds)).size
    assert rule.settings["size"] == dict(expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"frames": 2}, "unknown keys: frames"),
        ({"image_mean": [0, 0, 0]}, "cannot change image_mean"),
        ({"patch_size": 16}, "cannot change patch_size"),
        ({"max_pixels": "many"}, "max_pixels 'many'"),
        ({"max_pixels": 0}, "max_pixels 0"),
        ({"min_pixels": True}, "min_pixels True"),
        ({"size": {"longest_edge": 99}}, "shortest_edge"),
        ({"resample": 5}, "resample"),
        ({"do_resize": False}, "multiples of 28"),
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
        lambda: rule.embedding_layout("video", 4, {"video_grid_thw": (1, 4, 4)}),
    ):
        with pytest.raises(RequestError, match="images only"):
            refuse()


def test_placeholder_is_written_with_its_tags_and_cut_at_the_pad() -> None:
    sign = make_rule().placeholder("image")
    assert sign.text == "<|vision_start|><|image_pad|><|vision_end|>"
    assert (sign.token_id, sign.pattern.replace("\\", "")) == (PAD, "<|image_pad|>")


def test_embedding_layout_keeps_the_grid() -> None:
    layout = make_rule().embedding_layout("image", 6, {"image_grid_thw": (1, 4, 6)})
    assert (layout.num_features, layout.numbers, layout.plan.views, layout.num_patches) == (6, (1, 4, 6), (), 0)


@pytest.mark.parametrize(
    "extras",
    [{}, {"image_sizes": (3, 3)}, *({"image_grid_thw": g} for g in [(1, 4, 4), (2, 2, 6), (1, 3, 8), (1, 24, 1)])],
)
def test_embedding_layout_without_a_fitting_grid_is_refused(extras: Mapping[str, Any]) -> None:
    with pytest.raises(RequestError, match="image_grid_thw"):
        make_rule().embedding_layout("image", 6, cast(Mapping[str, Any], extras))
