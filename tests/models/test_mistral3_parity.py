"""What only Pixtral and Mistral 3 do, and the mistakes that comparing them with transformers would show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opsin.errors import UnsupportedModelError
from opsin.models.hub import find_model
from opsin.models.towers import pixtral
from opsin.models.towers.packing import Packing
from tests.factories.families import MISTRAL3 as FAMILY
from tests.factories.family import Family
from tests.models.driver import TOLERANCE, Driver, Row, meta_model, pictures

Tiny = Callable[[Family, str], Path]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mistral3", {"use_mask": True}, "use_mask"),
        ("mistral3", {"vision_feature_layer": [-1, -2]}, "single layer"),
        ("mistral3", {"vision_config": {"head_dim": 8}}, "head_dim"),
        ("mistral3", {"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_parameters"),
        ("mistral3", {"vision_config": {"num_attention_heads": 16, "head_dim": 2}}, "multiples of 4"),
        ("mistral3", {"text_config": {"model_type": "ministral3"}}, "ministral3"),
        ("pixtral", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ("pixtral", {"spatial_merge_size": 2}, "spatial_merge_size"),
    ],
)
def test_mistral3_setting_that_is_not_implemented_is_refused(
    tiny: Tiny, name: str, change: dict[str, object], reason: str
):
    with pytest.raises(UnsupportedModelError, match=reason):
        meta_model(find_model(str(tiny(FAMILY, name)), overrides=change).config)


@pytest.mark.parametrize("name", FAMILY.hub_configs)
def test_mistral3_hub_config_is_not_tied(name: str):
    """Both carry a head of their own, and say nothing about it."""
    assert not meta_model(FAMILY.hub_configs[name]).decoder.lm_head.is_tied


# ------------------------------------------------------------------------------------------- mistakes show


def _prompt(driver: Driver) -> Row:
    return driver.prompt(FAMILY.question, pictures(FAMILY.sizes))


def _swapped_pictures(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    row = _prompt(driver)
    row.features = torch.cat([driver.encode([image]) for image in pictures(FAMILY.sizes)[::-1]])
    return row


def _exchanged_axes(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    """Columns turn where rows should."""
    tower = driver.model.tower  # type: ignore[attr-defined]
    patch.setattr(tower, "inverse_2R", tower.inverse_2R.flip(0))
    return _prompt(driver)


def _rows_of_patches(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    """Positions row by row, though the patches come block by block."""
    right = pixtral.pack

    def wrong(grids: list[tuple[int, int]], merge: int, window: None) -> Packing:
        return right(grids, 1, window)

    patch.setattr(pixtral, "pack", wrong)
    return _prompt(driver)


def _transposed_blocks(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    """The merger's weight for blocks that run column by column."""
    layer = driver.model.projector.patch_merger.merging_layer  # type: ignore[attr-defined]
    turned = layer.weight.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1).contiguous()
    patch.setattr(layer, "weight", torch.nn.Parameter(turned, requires_grad=False))
    return _prompt(driver)


def _all_see_all(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    """The patches of one picture see the other's."""
    right = pixtral.pack

    def wrong(grids: list[tuple[int, int]], merge: int, window: None) -> Packing:
        packing = right(grids, merge, window)
        return packing._replace(full_lens=(sum(packing.full_lens),))

    patch.setattr(pixtral, "pack", wrong)
    return _prompt(driver)


def _no_row_breaks(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    """Rows end with the token that should end the picture."""
    row = _prompt(driver)
    row.ids = [driver.rule.end_token_id if i == driver.rule.break_token_id else i for i in row.ids]
    return row


@pytest.mark.parametrize(
    "mistake",
    [_swapped_pictures, _exchanged_axes, _rows_of_patches, _transposed_blocks, _all_see_all, _no_row_breaks],
)
def test_mistral3_mistakes_move_logits_by_1000_tolerances(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Driver, pytest.MonkeyPatch], Row]
):
    """The comparison with transformers can fail."""
    driver = Driver(tiny(FAMILY, "mistral3"), kernels="reference")
    expected = driver.prefill(_prompt(driver))[-1]
    wrong = driver.prefill(mistake(driver, monkeypatch))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE
