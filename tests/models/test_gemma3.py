"""Gemma 3's rule, and what only Gemma 3 does, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.models.gemma3.rule import Gemma3Rule, pan_and_scan
from opsin.models.rule import TokenRun
from opsin.types import Crop
from tests.factories import hub_configs
from tests.factories.families import GEMMA3
from tests.factories.family import FEATURE_SIZES
from tests.factories.gemma3 import IMAGE, hf_inputs
from tests.models.driver import TOLERANCE, Driver, Oracle, Row, meta_model, pictures

CONFIG = hub_configs.GEMMA3["gemma-3-4b-it"]
PROCESSOR = {  # of the hub's checkpoint, nulls included
    "do_convert_rgb": None,
    "do_pan_and_scan": None,
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 256,
    "pan_and_scan_max_num_crops": None,
    "resample": 2,
    "size": {"height": 896, "width": 896},
}
SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_min_ratio_to_activate": 1.1}
Tiny = Callable[[Any, str], Path]


TOKENS = {"<start_of_image>": 255999, "<end_of_image>": 256000, "<image_soft_token>": 262144}


class Vocabulary:
    def convert_tokens_to_ids(self, token: str) -> int | None:
        return TOKENS.get(token)


def make_rule(**processor: Any) -> Gemma3Rule:
    return Gemma3Rule.from_hf(CONFIG, PROCESSOR | processor, Vocabulary())


def test_picture_of_the_hub_s_checkpoint_is_256_features_between_tags_and_blank_lines():
    rule = make_rule()
    layout = rule.layout("image", 3000, 200, 1, {})
    assert (layout.num_features, layout.num_patches, layout.plan.tile_sizes) == (256, 4096, [(896, 896)])
    assert rule.expand("image", 1, layout) == [
        "\n\n",
        TokenRun(255999),
        TokenRun(262144, 256, is_feature=True),
        TokenRun(256000),
        "\n\n",
    ]
    assert rule.bidirectional([(3, 259), (300, 556)], 600) == [(3, 259), (300, 556)]


def test_pan_and_scan_cuts_the_longer_side():
    cut = [Crop(0, 0, 334, 300), Crop(334, 0, 334, 300), Crop(668, 0, 332, 300)]
    assert pan_and_scan(1000, 300, 256, 4, 1.2) == cut
    assert [(crop.top, crop.height) for crop in pan_and_scan(300, 1000, 256, 4, 1.2)] == [
        (0, 334),
        (334, 334),
        (668, 332),
    ]
    assert len(pan_and_scan(5000, 300, 256, 4, 1.2)) == 4
    assert len(pan_and_scan(600, 480, 256, 4, 1.2)) == 2
    for nearly_square_or_small in ((570, 480), (480, 480), (800, 200), (500, 300)):
        assert pan_and_scan(*nearly_square_or_small, 256, 4, 1.2) == []
    with pytest.raises(MediaError, match="9 x 1 "):
        pan_and_scan(9, 1, 1, 6, 1.2)


def ours(driver: Driver, size: tuple[int, int], options: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
    """Normalised tiles, channels first, and the prompt's ids."""
    image, table = pictures([size]), driver.rule.norm.table()
    made = [
        np.take_along_axis(table, tile.reshape(-1, 3).numpy(), 0).reshape(tile.shape)
        for tile in driver.read(image, options).tiles[0]
    ]
    return np.stack(made).transpose(0, 3, 1, 2), driver.prompt(f"See {IMAGE} here", image, options).ids


@pytest.mark.parametrize(
    "options",
    [{}, {"resample": 0}, SCAN, SCAN | {"pan_and_scan_max_num_crops": 1}, SCAN | {"pan_and_scan_max_num_crops": 9}],
    ids=["plain", "nearest", "scan", "one-crop", "many-crops"],
)
def test_pixels_and_tokens_over_sizes_equal_transformers(tiny: Tiny, options: dict[str, Any]):
    folder = tiny(GEMMA3, "sliding-full")
    driver = Driver(folder)
    for size in (*FEATURE_SIZES, (64, 50), (99, 20), (21, 187), (700, 30)):
        expected = hf_inputs(folder, f"See {IMAGE} here", pictures([size]), **options)
        pixels, ids = ours(driver, size, options)
        assert np.array_equal(pixels, expected["pixel_values"].numpy()), size
        assert ids == expected["input_ids"][0].tolist(), size


def test_logits_of_crops_equal_transformers(tiny: Tiny):
    folder = tiny(GEMMA3, "sliding-full")
    driver, images = Driver(folder), pictures([(120, 40), (40, 40)])
    inputs = hf_inputs(folder, GEMMA3.question, images, **SCAN)
    row = driver.prompt(GEMMA3.question, images, SCAN)
    assert len(row.bidirectional) == 5
    torch.testing.assert_close(driver.prefill(row), Oracle(GEMMA3.load(folder)).logits(inputs), atol=TOLERANCE, rtol=0)


def test_blank_lines_join_the_text_beside_them(tiny: Tiny):
    """As where a chat template ends a line before the picture."""
    folder = tiny(GEMMA3, "sliding-full")
    driver, images = Driver(folder), pictures([(40, 30)])
    for text in (f"user\n{IMAGE}What?", f"{IMAGE}\n\nWhat?", f"\n\n{IMAGE}\n", f"{IMAGE}"):
        assert driver.prompt(text, images).ids == hf_inputs(folder, text, images)["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("config", "processor", "words"),
    [
        ({"vision_config": {"model_type": "vit"}}, {}, "vit"),
        ({"boi_token_index": 7}, {}, "boi_token_index is 7"),
        ({}, {"pan_and_scan": True}, "pan_and_scan"),
        ({}, {"do_pan_and_scan": True, "pan_and_scan_max_num_crops": 0}, "pan_and_scan_max_num_crops"),
        ({}, {"size": {"height": 448, "width": 448}}, "448"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(config: dict[str, Any], processor: dict[str, Any], words: str):
    with pytest.raises(UnsupportedModelError, match=words):
        Gemma3Rule.from_hf(CONFIG | config, PROCESSOR | processor, Vocabulary())


@pytest.mark.parametrize(
    "options",
    [
        {"pan_and_scan_min_crop_size": 1.5},
        {"pan_and_scan_max_num_crops": 65},
        {"pan_and_scan_min_ratio_to_activate": "1"},
        {"do_pan_and_scan": 1},
        {"num_crops": 4},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]):
    with pytest.raises(RequestError, match=next(iter(options))):
        make_rule().layout("image", 30, 30, 1, {"do_pan_and_scan": True} | options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mm_tokens_per_image": 250}, "mm_tokens_per_image is 250"),
        ({"mm_tokens_per_image": 9}, "divisor of 64"),
        ({"text_config": CONFIG["text_config"] | {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
        ({"text_config": CONFIG["text_config"] | {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
        ({"text_config": CONFIG["text_config"] | {"layer_types": ["full_attention"]}}, "1 entries for 34 layers"),
    ],
)
def test_config_that_is_not_implemented_is_refused(change: dict[str, Any], words: str):
    with pytest.raises(UnsupportedModelError, match=words):
        meta_model(CONFIG | change)


def test_hub_config_has_windows_on_five_layers_of_six_and_a_rope_for_them():
    config = meta_model(CONFIG).decoder.config
    assert [layer.window for layer in config.layers] == [None if i % 6 == 5 else 1024 for i in range(34)]
    assert (config.rope.theta, config.rope.kind, config.rope.scaling["factor"]) == (1e6, "linear", 8.0)
    assert (config.window_rope.theta, config.window_rope.kind) == (1e4, "default")
    assert (config.num_heads, config.layers[0].num_kv_heads, config.layers[0].head_dim) == (8, 4, 256)


@pytest.mark.parametrize("name", ["sliding-full", "window-in-a-picture"])
def test_likely_mistakes_move_the_logits(tiny: Tiny, name: str):
    folder = tiny(GEMMA3, name)
    images = pictures(GEMMA3.sizes)
    expected = Oracle(GEMMA3.load(folder)).logits(hf_inputs(folder, GEMMA3.question, images))

    def moved(change: Callable[[Row], None], text: dict[str, Any] | None = None) -> float:
        driver = Driver(folder, overrides={"text_config": text or {}})
        row = driver.prompt(GEMMA3.question, images)
        change(row)
        return (driver.prefill(row) - expected).abs().max().item()

    def unchanged(row: Row) -> None:
        pass

    def causal(row: Row) -> None:
        row.bidirectional = []

    def swapped(row: Row) -> None:
        assert row.features is not None
        row.features = row.features.roll(len(row.features) // 2, 0)

    kinds = {kind: {"rope_type": "default", "rope_theta": 1000.0} for kind in ("full_attention", "sliding_attention")}
    assert moved(unchanged) < TOLERANCE
    assert min(moved(causal), moved(swapped)) > 1000 * TOLERANCE
    for text in ({"sliding_window": 20}, {"query_pre_attn_scalar": 24}, {"rope_parameters": kinds}):
        assert moved(unchanged, text) > 1000 * TOLERANCE, text
