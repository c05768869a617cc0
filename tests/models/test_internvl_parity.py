"""What only InternVL does, and the mistakes that comparing it with transformers would show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opsin.errors import UnsupportedModelError, WeightError
from opsin.models.hub import find_model
from opsin.models.internvl import model as internvl
from tests.factories.families import INTERNVL as FAMILY
from tests.factories.family import Family
from tests.models.driver import TOLERANCE, Driver, Row, copy_with_weights, flip_channels, meta_model, pictures

Tiny = Callable[[Family, str], Path]


@pytest.mark.parametrize("name", FAMILY.shapes)
def test_internvl_pictures_of_the_parity_prompt_make_several_tiles(tiny: Tiny, name: str):
    folder = tiny(FAMILY, name)
    images = pictures(FAMILY.sizes)
    assert len(FAMILY.pictures_inputs(folder, images)["pixel_values"]) > len(images)


def test_internvl_missing_and_surplus_tower_weights_are_named(tiny: Tiny, tmp_path: Path):
    folder = tiny(FAMILY, "qwen2")
    weights = load_file(folder / "model.safetensors")
    weights["vision_tower.encoder.layer.0.attention.q_norm.weight"] = weights.pop(
        "vision_tower.encoder.layer.1.lambda_2"
    )
    with pytest.raises(WeightError, match=r"tower\.encoder\.layers\.1\.lambda_2.*unused.*q_norm"):
        Driver(copy_with_weights(folder, tmp_path, weights))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"deepstack": True}, r"config\.json\.deepstack"),
        ({"text_config": {"qk_norm": True}}, r"text_config\.qk_norm"),
        ({"text_config": {"model_type": "qwen3"}}, "qwen3"),
        ({"vision_config": {"use_head": True}}, r"vision_config\.use_head"),
        ({"vision_config": {"norm_type": "batch_norm"}}, "norm_type"),
        ({"vision_config": {"num_channels": 4}}, "num_channels"),
        ({"vision_config": {"num_attention_heads": 5}}, "5 heads"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"vision_feature_layer": [-1, -2]}, "single layer"),
        ({"vision_feature_layer": -5}, "has 3 layers"),
        ({"projector_hidden_act": "tanhshrink"}, "projector_hidden_act"),
        ({"text_config": {"rope_parameters": {"rope_type": "dynamic", "alpha": 3.0}}}, "dynamic"),
    ],
)
def test_internvl_config_that_is_not_implemented_is_refused(tiny: Tiny, change: dict[str, Any], reason: str):
    with pytest.raises(UnsupportedModelError, match=reason):
        Driver(tiny(FAMILY, "qwen2"), overrides=change)


def test_internvl_dynamic_ntk_past_the_trained_length_is_refused(tiny: Tiny):
    """Up to it, the scaling changes nothing."""
    files = find_model(str(tiny(FAMILY, "dynamic-ntk")))
    assert meta_model(files.config, max_model_len=512).spec.max_position == 512
    with pytest.raises(UnsupportedModelError, match="max_model_len is 513"):
        meta_model(files.config, max_model_len=513)


@pytest.mark.parametrize("name", FAMILY.hub_configs)
def test_internvl_hub_config_is_not_tied(name: str):
    """The checkpoints of 2025 are not tied, and their config says so in neither place."""
    model: Any = meta_model(FAMILY.hub_configs[name])
    assert not model.decoder.lm_head.is_tied


# ------------------------------------------------------------------------------------------- mistakes show


def _swapped(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    row = driver.prompt(FAMILY.question, images)
    parts = [driver.encode([image]) for image in images[::-1]]
    row.features = torch.cat(parts)
    return row


def _thumbnail_first(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    row = driver.prompt(FAMILY.question, images)
    assert row.features is not None
    count = driver.items(images)[0].layout.num_features
    first = row.features[:count].roll(driver.rule.tile.num_features, 0)
    row.features = torch.cat([first, row.features[count:]])
    return row


def _transposed_shuffle(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """The patches of a block column by column."""
    edge = 2

    def wrong(hidden_BPD: torch.Tensor, merge: int) -> torch.Tensor:
        return hidden_BPD.unflatten(1, (edge, merge, edge, merge)).permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(0, 2)

    patch.setattr(internvl, "pixel_shuffle", wrong)
    return driver.prompt(FAMILY.question, images)


def _class_token_kept(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """The last row dropped, not the first."""
    tower: Any = driver.model.tower  # type: ignore[attr-defined]
    forward = tower.forward
    patch.setattr(tower, "forward", lambda patches: forward(patches).roll(1, 1))
    return driver.prompt(FAMILY.question, images)


def _no_layer_scale(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    for layer in driver.model.tower.encoder.layers:  # type: ignore[attr-defined]
        layer.lambda_2.data.fill_(1.0)
    return driver.prompt(FAMILY.question, images)


def _norms_per_head(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """Queries normalised head by head."""
    for layer in driver.model.tower.encoder.layers:  # type: ignore[attr-defined]
        norm = layer.attention.q_norm
        patch.setattr(
            norm,
            "forward",
            lambda x, norm=norm: (
                torch.nn.functional.rms_norm(x.unflatten(-1, (2, 16)), (16,), eps=norm.eps).flatten(-2) * norm.weight,
            ),
        )
    return driver.prompt(FAMILY.question, images)


def _no_tags(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """Text in place of the tags around the pictures."""
    row = driver.prompt(FAMILY.question, images)
    rule = driver.rule
    row.ids = [77 if token in (rule.start_token_id, rule.end_token_id) else token for token in row.ids]
    return row


def _flipped_channels(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    return driver.prompt(FAMILY.question, flip_channels(images))


@pytest.mark.parametrize(
    "mistake",
    [
        _swapped,
        _thumbnail_first,
        _transposed_shuffle,
        _class_token_kept,
        _no_layer_scale,
        _norms_per_head,
        _no_tags,
        _flipped_channels,
    ],
)
def test_internvl_mistakes_move_logits_by_1000_tolerances(tiny: Tiny, mistake: Any, monkeypatch: pytest.MonkeyPatch):
    """The comparison with transformers can fail."""
    driver = Driver(tiny(FAMILY, "internvit-6b"))
    images = pictures([(90, 70), (70, 90)])
    right = driver.prefill(driver.prompt(FAMILY.question, images))
    wrong = driver.prefill(mistake(driver, images, monkeypatch))
    assert (right - wrong).abs().max() > 1000 * TOLERANCE
