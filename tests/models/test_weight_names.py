"""Every name in a hub checkpoint finds its place, and every place is filled once: true sizes, on the meta device.

Checkpoints spell names in up to three ways: after transformers 5's modules; as it saves them, which is mostly as
transformers 4 did; and that with the level that transformers 4's CLIP and SigLIP had, and without a tied head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from opsin.layers.linear import Linear, MergedLinear
from opsin.models.weights import _slots
from tests.factories import hub_configs, minicpmv
from tests.factories.families import FAMILIES, over
from tests.factories.family import Family
from tests.factories.released import RELEASED
from tests.models.driver import meta_model

SPELLINGS = ("modules", "hub", "hub of transformers 4")
_TOWERS_WITH_A_LEVEL = ("CLIPVisionModel", "SiglipVisionModel")


def spelled(model: Any, spelling: str, *, is_tied: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    tensors = model.state_dict()
    if spelling != "modules":
        tensors = revert_weight_conversion(model, tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if spelling != SPELLINGS[-1]:
        return shapes
    if type(getattr(model.model, "vision_tower", None)).__name__ in _TOWERS_WITH_A_LEVEL:
        shapes = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): s for name, s in shapes.items()}
    return {name: shape for name, shape in shapes.items() if not (is_tied and name.endswith("lm_head.weight"))}


@over(lambda family: family.hub_configs)
def test_names_of_the_hub_s_checkpoint_fill_every_place_once(family: Family, name: str):
    config = family.hub_configs[name]
    ours = meta_model(config)
    table, places = ours.weight_table(), _slots(ours)
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    for spelling in SPELLINGS:
        missing = {part for place in places.values() for part in place.parts}
        for given, shape in spelled(theirs, spelling, is_tied=ours.decoder.lm_head.is_tied).items():
            target = table.rename(given)
            if target not in places:
                assert table.is_unused(target), (spelling, given, target)
                continue
            assert places[target].shape == shape, (spelling, given)
            assert places[target].parts <= missing, f"{spelling}: {given} fills {target} again"
            missing -= places[target].parts
        assert not missing, (spelling, sorted(missing)[:5])
    filled = {tuple(place.parts): math.prod(place.shape) for place in places.values() if len(place.parts) == 1}
    assert sum(filled.values()) == sum(p.numel() for p in ours.parameters()) - num_zeros(ours)


def num_zeros(model: nn.Module) -> int:
    """What fills up widths that tensor cores do not take."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    beside = sum(len(linear.weight) * linear.num_spare_inputs for linear in linears)
    merged = [linear for linear in linears if isinstance(linear, MergedLinear)]
    return beside + sum(
        len(linear.pieces) * linear.num_spare * sum(math.prod(p.shape[1:]) for p in linear.parameters())
        for linear in merged
    )


def test_every_checkpoint_that_is_named_has_its_names_tested():
    """Here, or against recorded names: ``test_phi3_v_recorded.py``, ``test_minicpmv_parity.py``."""
    here = [config for family in FAMILIES for config in family.hub_configs.values()]
    recorded = [*hub_configs.PHI3_V.values(), minicpmv.hub_config()]
    assert [released.hub_id for released in RELEASED if released.config not in [*here, *recorded]] == []
