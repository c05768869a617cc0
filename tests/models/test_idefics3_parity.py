"""What only Idefics3 and SmolVLM do, and the mistakes that comparing them with transformers would show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opsin.errors import UnsupportedModelError
from opsin.models.hub import find_model
from opsin.models.idefics3 import model as idefics3
from tests.factories.families import IDEFICS3 as FAMILY
from tests.factories.family import Family
from tests.models.driver import TOLERANCE, Driver, Row, meta_model, pictures

Tiny = Callable[[Family, str], Path]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "idefics2"}, "model_type"),
        ({"use_mask": True}, "use_mask"),
        ({"scale_factor": 3}, "scale_factor"),
        ({"text_config": {"qk_layer_norms": True}}, "qk_layer_norms"),
        ({"text_config": {"use_resampler": True}}, "use_resampler"),
        ({"text_config": {"pixel_shuffle_factor": 4}}, "pixel_shuffle_factor"),
        ({"text_config": {"qk_norm": True}}, "qk_norm"),
        ({"vision_config": {"use_head": True}}, "use_head"),
        ({"vision_config": {"use_base_siglip": True}}, "use_base_siglip"),
    ],
)
def test_idefics3_setting_that_is_not_implemented_is_refused(tiny: Tiny, change: dict[str, object], reason: str):
    with pytest.raises(UnsupportedModelError, match=reason):
        meta_model(find_model(str(tiny(FAMILY, "idefics3")), overrides=change).config)


def test_idefics3_head_is_tied_by_the_outer_config_alone(tiny: Tiny):
    change = {"text_config": {"tie_word_embeddings": True}}
    model = meta_model(find_model(str(tiny(FAMILY, "idefics3")), overrides=change).config)
    assert not model.decoder.lm_head.is_tied


# ------------------------------------------------------------------------------------------- mistakes show


def _swapped_pictures(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    images = pictures(FAMILY.sizes)
    row = driver.prompt(FAMILY.question, images)
    row.features = torch.cat([driver.encode([image]) for image in images[::-1]])
    return row


def _overview_first(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    images = pictures(FAMILY.sizes)
    row = driver.prompt(FAMILY.question, images)
    assert row.features is not None
    count, tile = driver.items(images)[0].layout.num_features, driver.rule.tile.num_features
    row.features = torch.cat([row.features[:count].roll(tile, 0), row.features[count:]])
    return row


def _transposed_shuffle(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    """The patches of a block column by column."""

    def wrong(hidden_BPD: torch.Tensor, merge: int) -> torch.Tensor:
        return hidden_BPD.unflatten(1, (2, merge, 2, merge)).permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(0, 2)

    patch.setattr(idefics3, "pixel_shuffle", wrong)
    return driver.prompt(FAMILY.question, pictures(FAMILY.sizes))


def _no_last_norm(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    patch.setattr(driver.model.tower, "post_layernorm", torch.nn.Identity())  # type: ignore[attr-defined]
    return driver.prompt(FAMILY.question, pictures(FAMILY.sizes))


def _other_tag(driver: Driver, patch: pytest.MonkeyPatch) -> Row:
    """The first two tiles' tags exchanged."""
    row = driver.prompt(FAMILY.question, pictures(FAMILY.sizes))
    first, second = (row.ids.index(driver.tokenizer.convert_tokens_to_ids(f"<row_1_col_{col}>")) for col in (1, 2))
    row.ids[first], row.ids[second] = row.ids[second], row.ids[first]
    return row


@pytest.mark.parametrize(
    "mistake", [_swapped_pictures, _overview_first, _transposed_shuffle, _no_last_norm, _other_tag]
)
def test_idefics3_mistakes_move_logits_by_1000_tolerances(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Driver, pytest.MonkeyPatch], Row]
):
    """The comparison with transformers can fail."""
    driver = Driver(tiny(FAMILY, "idefics3"))
    expected = driver.prefill(driver.prompt(FAMILY.question, pictures(FAMILY.sizes)))[-1]
    wrong = driver.prefill(mistake(driver, monkeypatch))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE
