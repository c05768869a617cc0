"""What only GLM-4.1V does, and the mistakes that comparing it with transformers would show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from opsin.errors import UnsupportedModelError, WeightError
from opsin.kernels import select
from opsin.kernels.quantized import FP8, INT8
from opsin.layers import Placement
from opsin.layers.attention import NeighbourLinear
from opsin.models.hub import find_model
from opsin.models.load import load_model
from opsin.models.rule import Positions
from opsin.models.towers.glm_vit import CubicPositionGrid
from tests.factories.families import GLM4V as FAMILY
from tests.factories.glm4v import Glm4vShape, write_glm4v
from tests.models.driver import NORM, TOLERANCE, Driver, Row, copy_with_weights, flip_channels, meta_model, pictures

Tiny = Callable[[Any, str], Path]
CPU = Placement(select(torch.device("cpu"), "reference"), torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------------------------------------------------- configs


def test_flat_config_of_transformers_4_is_the_nested_one(tiny: Tiny, tmp_path: Path):
    nested, flat = tiny(FAMILY, "4.1"), write_glm4v(tmp_path, Glm4vShape(flat=True))
    assert "text_config" not in json.loads((flat / "config.json").read_text())
    images = pictures(FAMILY.sizes)
    logits = [driver.prefill(driver.prompt(FAMILY.question, images)) for driver in (Driver(nested), Driver(flat))]
    assert torch.equal(*logits)


def test_config_with_text_keys_twice_is_taken_while_they_agree(tiny: Tiny):
    """transformers 4.5x wrote the text config's keys at the top as well."""
    folder = tiny(FAMILY, "4.1")
    rope = find_model(str(folder)).config["text_config"]["rope_parameters"]
    Driver(folder, overrides={"hidden_size": 64, "rope_parameters": rope, "text_config": {"image_token_id": None}})
    with pytest.raises(UnsupportedModelError, match=r"config\.json\.hidden_size"):
        Driver(folder, overrides={"hidden_size": 32})


def test_released_network_is_the_same_under_either_name(tiny: Tiny, tmp_path: Path):
    """GLM-4.6V-Flash has been released as a Glm4vForConditionalGeneration, with GLM-4.6V's processor."""
    folder = tiny(FAMILY, "4.6")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Glm46VProcessor"}))
    first, second = Driver(folder), Driver(tmp_path)
    assert (first.rule.is_4_6, second.rule.is_4_6) == (True, True)
    images = pictures(FAMILY.sizes)
    rows = [driver.prompt(FAMILY.question, images) for driver in (first, second)]
    assert torch.equal(first.prefill(rows[0]), second.prefill(rows[1]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "glm4v_moe"}, "glm4v_moe"),
        ({"text_config": {"model_type": "glm4v_moe_text"}}, "glm4v_moe_text"),
        ({"deepstack": True}, "config.json.deepstack"),
        ({"text_config": {"n_routed_experts": 128}}, "n_routed_experts"),
        ({"text_config": {"attention_bias": False}}, "attention_bias"),
        ({"text_config": {"rope_parameters": {"mrope_section": [4, 4, 4]}}}, "mrope_section"),
        ({"vision_config": {"deepstack_visual_indexes": [1]}}, "deepstack_visual_indexes"),
        ({"vision_config": {"image_size": [40, 80]}}, "only squares"),
        ({"vision_config": {"out_hidden_size": 80}}, "80 values"),
        ({"vision_config": {"num_heads": 16}}, "multiples of 4"),
        ({"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}, "axial"),
    ],
)
def test_config_that_is_not_implemented_is_refused(tiny: Tiny, change: dict[str, Any], reason: str):
    with pytest.raises(UnsupportedModelError, match=reason):
        Driver(tiny(FAMILY, "4.1"), overrides=change)


def test_missing_tower_weight_is_named(tiny: Tiny, tmp_path: Path):
    folder = tiny(FAMILY, "4.1")
    weights = load_file(folder / "model.safetensors")
    del weights["model.visual.downsample.bias"]
    with pytest.raises(WeightError, match=r"tower\.downsample\.bias"):
        Driver(copy_with_weights(folder, tmp_path, weights))


@pytest.mark.parametrize("name", FAMILY.hub_configs)
def test_hub_config_rotates_half_a_head_by_three_axes(name: str):
    model = meta_model(FAMILY.hub_configs[name])
    rope = model.decoder.config.rope
    assert model.spec.num_position_axes == 3
    assert (rope.size, rope.sections, rope.interleaved) == (64, (8, 12, 12), False)
    assert (model.tower.config.position_edge, model.tower.config.norm_eps) == (24, 1e-5)


# --------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("edge", [1, 2, 5, 24])
@pytest.mark.parametrize("grid", [(2, 2), (2, 40), (24, 24), (48, 6), (7, 31)], ids=str)
def test_positions_between_points_equal_grid_sample(edge: int, grid: tuple[int, int]):
    table = torch.randn(edge**2, 8, generator=torch.Generator().manual_seed(0))
    ours = CubicPositionGrid(CPU, edge, 8)
    ours.weight.data.copy_(table)
    rows, cols = grid
    at_P2 = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    middles_P2 = (at_P2 + 0.5) / torch.tensor(grid) * 2 - 1
    square = table.view(1, edge, edge, 8).permute(0, 3, 1, 2)
    at_1PX2 = middles_P2.flip(1)[None, :, None]
    expected = F.grid_sample(square, at_1PX2, mode="bicubic", padding_mode="border", align_corners=False)
    got = ours(at_P2.int(), torch.tensor(grid, dtype=torch.int32).expand(rows * cols, 2))
    torch.testing.assert_close(got, expected[0, :, :, 0].T, atol=2e-5, rtol=0)


def test_positions_of_patches_that_pad_are_finite():
    """Graphs pad with zeros, the sizes of pictures among them."""
    ours = CubicPositionGrid(CPU, 5, 8)
    zeros = torch.zeros(3, 2, dtype=torch.int32)
    assert ours(zeros, zeros).isfinite().all()


# --------------------------------------------------------------------------------------------------------- rotation


def test_neighbours_become_halves_of_queries_and_keys_alone():
    linear = NeighbourLinear(CPU, 3, {"q_proj": 12, "k_proj": 6, "v_proj": 6}, bias=True, head=(6, 4))
    linear.weight.data.copy_(torch.arange(24.0)[:, None].expand(24, 3))
    assert linear.bias is not None
    linear.bias.data.copy_(torch.arange(24.0))
    linear.pack()
    head = [0, 2, 1, 3, 4, 5]
    expected = [*head, *(6 + i for i in head), *(12 + i for i in head), *range(18, 24)]
    assert linear.weight[:, 0].tolist() == expected
    assert linear.bias.tolist() == expected


@pytest.mark.parametrize(("kind", "dtype"), [("fp8", FP8), ("int8", INT8)])
def test_quantised_rows_are_put_in_halves_with_their_scales(tiny: Tiny, kind: Any, dtype: torch.dtype):
    files = find_model(str(tiny(FAMILY, "4.1")))
    settings: Any = {"device": torch.device("cpu"), "dtype": torch.float32, "kernels": "reference"}
    plain, ours = load_model(files, NORM, **settings), load_model(files, NORM, quantization=kind, **settings)
    for model in (plain, ours):
        assert isinstance(model, torch.nn.Module)
    exact: Any = plain.get_submodule("decoder.layers.1.self_attn.qkv_proj")  # type: ignore[attr-defined]
    rounded: Any = ours.get_submodule("decoder.layers.1.self_attn.qkv_proj")  # type: ignore[attr-defined]
    assert rounded.weight.dtype == dtype
    values = rounded.weight.float() * rounded.weight_scale.unsqueeze(1)
    largest = exact.weight.abs().amax(1, keepdim=True)
    assert ((values - exact.weight).abs() <= largest / 12).all()
    assert torch.equal(rounded.bias, exact.bias)


# --------------------------------------------------------------------------------------------------- mistakes show


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


def _transposed_rotation(driver: Driver, images: list[Image.Image]) -> Row:
    """Rows and columns exchanged in the tower's rotary positions alone."""
    tower: Any = driver.model.tower  # type: ignore[attr-defined]
    rotary = tower._rotary
    tower._rotary = lambda positions_P2: rotary(positions_P2.flip(-1))
    return driver.prompt(FAMILY.question, images)


def _transposed_positions(driver: Driver, images: list[Image.Image]) -> Row:
    """And in the learned ones alone."""
    grid: Any = driver.model.tower.positions  # type: ignore[attr-defined]
    grid.weight.data = grid.weight.unflatten(0, (grid.edge, grid.edge)).transpose(0, 1).flatten(0, 1).contiguous()
    return driver.prompt(FAMILY.question, images)


def _positions_by_corners(driver: Driver, images: list[Image.Image]) -> Row:
    """A picture's corner patches on the corners of the square, as Qwen3-VL has them."""
    grid: Any = driver.model.tower.positions  # type: ignore[attr-defined]
    shares = grid._shares

    def at_corners(at_P2: torch.Tensor) -> torch.Tensor:
        low, high = at_P2.amin(0), at_P2.amax(0)
        return shares((at_P2 - low) / (high - low).clamp(min=1e-6) * (grid.edge - 1))

    grid._shares = at_corners
    return driver.prompt(FAMILY.question, images)


def _halves_rotated(driver: Driver, images: list[Image.Image]) -> Row:
    """Neighbours left as checkpoints have them."""
    for module in driver.model.modules():  # type: ignore[attr-defined]
        if isinstance(module, NeighbourLinear):
            back = torch.argsort(module._order())
            module.weight.data, module.bias.data = module.weight.data[back], module.bias.data[back]  # type: ignore[union-attr]
    return driver.prompt(FAMILY.question, images)


def _norms_exchanged(driver: Driver, images: list[Image.Image]) -> Row:
    """What is ahead of the MLP for what is behind attention, since checkpoints call it what others call the latter."""
    layers: Any = driver.model.decoder.layers  # type: ignore[attr-defined]
    for layer in layers:
        ahead, behind = layer.pre_feedforward_layernorm, layer.post_attention_layernorm
        ahead.weight, behind.weight = behind.weight, ahead.weight
    return driver.prompt(FAMILY.question, images)


def _flipped_channels(driver: Driver, images: list[Image.Image]) -> Row:
    return driver.prompt(FAMILY.question, flip_channels(images))


@pytest.mark.parametrize(
    "mistake",
    [
        *(_swapped, _axes_shifted, _sequential, _transposed_rotation, _transposed_positions, _positions_by_corners),
        *(_halves_rotated, _norms_exchanged, _flipped_channels),
    ],
)
def test_mistakes_move_logits_by_1000_tolerances(tiny: Tiny, mistake: Callable[..., Row]):
    """The comparison with transformers can fail."""
    driver = Driver(tiny(FAMILY, "4.1"), kernels="reference")
    images = pictures(FAMILY.sizes)
    expected = driver.prefill(driver.prompt(FAMILY.question, images))[-1]
    wrong = driver.prefill(mistake(driver, images))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE
