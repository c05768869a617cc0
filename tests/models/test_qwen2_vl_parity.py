"""What only Qwen2-VL and Qwen2.5-VL do, and the mistakes that comparing them with transformers would show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opsin.errors import UnsupportedModelError, WeightError
from opsin.models.hub import find_model
from opsin.models.rule import Positions
from opsin.models.towers.packing import pack
from tests.factories.families import QWEN2_VL as FAMILY
from tests.models.driver import TOLERANCE, Driver, Row, copy_with_weights, flip_channels, meta_model, pictures


def test_qwen2_vl_missing_tower_weight_is_named(tiny, tmp_path):
    folder = tiny(FAMILY, "qwen2")
    weights = load_file(folder / "model.safetensors")
    del weights["visual.blocks.1.attn.qkv.bias"]
    with pytest.raises(WeightError, match=r"tower\.blocks\.1\.attn\.q_proj\.bias"):
        Driver(copy_with_weights(folder, tmp_path, weights))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "qwen3_vl"}, "qwen3_vl"),
        ({"deepstack": True}, "config.json.deepstack"),
        ({"text_config": {"qk_norm": True}}, "text_config.qk_norm"),
        ({"vision_config": {"use_head": True}}, "vision_config.use_head"),
        ({"vision_config": {"in_chans": 4}}, "in_chans"),
        ({"vision_config": {"hidden_size": 80}}, "80 values"),
        ({"vision_config": {"num_heads": 16}}, "multiples of 4"),
        ({"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}, "axial"),
        ({"text_config": {"rope_parameters": {"mrope_section": [4, 4, 4]}}}, "mrope_section"),
    ],
)
def test_qwen2_vl_config_that_is_not_implemented_is_refused(tiny, change, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        Driver(tiny(FAMILY, "qwen2"), overrides=change)


def test_qwen2_vl_config_with_text_keys_twice_is_taken_while_they_agree(tiny):
    """transformers 4.5x wrote the text config's keys at the top as well."""
    folder = tiny(FAMILY, "qwen2")
    text = find_model(str(folder)).config["text_config"]
    assert Driver(folder, overrides={"hidden_size": text["hidden_size"]}).model.spec.hidden_size == 64
    Driver(folder, overrides={"text_config": {"image_token_id": 5, "vision_end_token_id": 4}})
    with pytest.raises(UnsupportedModelError, match=r"config\.json\.hidden_size"):
        Driver(folder, overrides={"hidden_size": 32})


def test_pack_of_still_pictures_needs_no_order():
    packing = pack([(2, 4), (2, 2)], 2, None)
    assert packing.order_M is None
    assert (packing.full_lens, packing.window_lens) == ((8, 4), ())
    assert packing.positions_P2[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]


def test_pack_with_windows_keeps_pictures_apart():
    packing = pack([(2, 10), (4, 2)], 2, 2)
    assert packing.order_M is not None
    assert packing.order_M.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert packing.window_lens == (8, 8, 4, 8)
    assert sorted(pack([(12, 20)], 2, 4).order_M.tolist()) == list(range(60))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FAMILY.hub_configs)
def test_qwen2_vl_hub_config_has_three_position_axes(name):
    assert meta_model(FAMILY.hub_configs[name]).spec.num_position_axes == 3


# ------------------------------------------------------------------------------------------- mistakes show


def _swapped(driver: Driver, images: list[Image.Image]) -> Row:
    row = driver.prompt(FAMILY.question, images)
    row.features = driver.encode(images[::-1])
    return row


def _axes_shifted(driver: Driver, images: list[Image.Image]) -> Row:
    row = driver.prompt(FAMILY.question, images)
    assert row.positions is not None
    time, height, width = row.positions.axes
    row.positions = Positions((width, time, height), row.positions.delta)
    return row


def _sequential(driver: Driver, images: list[Image.Image]) -> Row:
    row = driver.prompt(FAMILY.question, images)
    row.positions = None
    return row


def _raster_order(driver: Driver, images: list[Image.Image]) -> Row:
    """Features of the first picture column by column."""
    row = driver.prompt(FAMILY.question, images)
    _, rows, cols = (n // 2 for n in driver.items(images)[0].layout.numbers)
    assert row.features is not None
    first = row.features[: rows * cols].unflatten(0, (rows, cols)).transpose(0, 1).flatten(0, 1)
    row.features = torch.cat([first, row.features[rows * cols :]])
    return row


def _transposed_tower(driver: Driver, images: list[Image.Image]) -> Row:
    """Rows and columns exchanged in the tower's rotary positions alone."""
    tower: Any = driver.model.tower  # type: ignore[attr-defined]
    rotary = tower._rotary
    tower._rotary = lambda positions_P2: rotary(positions_P2.flip(-1))
    return driver.prompt(FAMILY.question, images)


def _flipped_channels(driver: Driver, images: list[Image.Image]) -> Row:
    return driver.prompt(FAMILY.question, flip_channels(images))


@pytest.mark.parametrize("name", FAMILY.towers)
@pytest.mark.parametrize(
    "mistake", [_swapped, _axes_shifted, _sequential, _raster_order, _transposed_tower, _flipped_channels]
)
def test_qwen2_vl_mistakes_move_logits_by_1000_tolerances(tiny, name, mistake):
    """The comparison with transformers can fail."""
    driver = Driver(tiny(FAMILY, name))
    images = pictures(FAMILY.sizes)
    expected = driver.prefill(driver.prompt(FAMILY.question, images))[-1]
    wrong = driver.prefill(mistake(driver, images))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE


def test_qwen2_5_vl_windows_matter(tiny):
    folder = tiny(FAMILY, "qwen2.5")
    windowed, blind = Driver(folder), Driver(folder, overrides={"vision_config": {"window_size": 10_000}})
    images = pictures(FAMILY.sizes)
    assert (windowed.encode(images) - blind.encode(images)).abs().max() > 1000 * TOLERANCE
