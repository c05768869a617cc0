"""However many tiles an item has, no pass of a tower is larger than what a step's memory was planned for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opsin.models.phi3_v import model as phi3_v
from opsin.models.towers import patches
from opsin.models.towers.attention import PatchAttention
from tests.factories import minicpmv
from tests.factories.families import FAMILIES
from tests.factories.family import Family
from tests.models.driver import Driver, pictures

SIZES = [(90, 60), (200, 33), (40, 40), (33, 120), (64, 64)]


@pytest.fixture(params=[*FAMILIES, None], ids=[*(family.name for family in FAMILIES), "minicpmv"])
def driver(
    request: pytest.FixtureRequest, tiny: Callable[[Family, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Driver:
    family: Family | None = request.param
    if family is None:
        return Driver(minicpmv.write_minicpmv(tmp_path_factory.mktemp("minicpmv"), minicpmv.SHAPES["plain"]))
    return Driver(tiny(family, next(iter(family.shapes))))


def test_a_pass_beyond_the_limit_holds_one_tile_and_features_stay_the_same(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, images = driver.model.tower, pictures(SIZES)  # type: ignore[attr-defined]
    num_patches: list[int] = []
    for module in tower.modules():
        if isinstance(module, PatchAttention):
            module.register_forward_hook(lambda module, args, output: num_patches.append(args[1].shape[0]))
    areas = [height * width for layout in driver.read(images).layouts for height, width in layout.plan.tile_sizes]
    together = driver.encode(images)
    (in_one_pass,) = set(num_patches)
    num_patches.clear()
    for module in (patches, phi3_v):
        monkeypatch.setattr(module, "MAX_PASS", 1)
    torch.testing.assert_close(driver.encode(images), together, atol=1e-5, rtol=0)
    assert max(num_patches) * sum(areas) <= in_one_pass * max(areas)
