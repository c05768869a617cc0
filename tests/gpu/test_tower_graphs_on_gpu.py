"""Every family's tower replayed from CUDA graphs: for new pictures, the features of one launched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from opsin.models import resolve
from opsin.models.hub import find_model
from opsin.models.load import load_model
from opsin.runner.executor import Pixels
from opsin.runner.graphs import Recorder
from opsin.runner.tower import EagerTower, ReplayedTower
from opsin.types import MediaLayout
from tests.factories.families import FAMILIES
from tests.factories.family import Family, Size

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
CASES = [pytest.param(row, name, id=f"{row.name}-{name}") for row in FAMILIES for name in row.towers]
MIXTURES: Sequence[Sequence[Size]] = (
    [(90, 70), (200, 33)],
    [(40, 60), (30, 30), (33, 200)],
    [(90, 70)],
    [(30, 30)] * 5,
    [(33, 200), (90, 70), (30, 30)],
    [(200, 33), (90, 70)],
    [(30, 30), (33, 200), (40, 60)],
    [(640, 480), (480, 640), (90, 70)],
)


class Towers:
    """A checkpoint's tower, launched, in several dtypes, and pictures for it."""

    def __init__(self, family: Family, name: str, tmp_path: Path) -> None:
        folder = family.write(tmp_path, family.shapes[name])
        self.files = find_model(str(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.rule = resolve(self.files.config).load_rule().from_hf(self.files.config, self.files.processor, tokenizer)
        self.random = np.random.default_rng(0)

    def eager(self, dtype: torch.dtype) -> EagerTower:
        return EagerTower(load_model(self.files, self.rule.norm, device=DEVICE, dtype=dtype), DEVICE)

    def layouts(self, sizes: Sequence[Size]) -> list[MediaLayout]:
        return [self.rule.layout("image", *size, 1, {}) for size in sizes]

    def items(self, layouts: Sequence[MediaLayout]) -> list[Pixels]:
        return [Pixels(self.random.integers(0, 256, layout.plan.num_bytes, dtype=np.uint8)) for layout in layouts]


@pytest.fixture
def towers(family: Family, name: str, tmp_path: Path) -> Towers:
    return Towers(family, name, tmp_path)


@torch.inference_mode()
@pytest.mark.parametrize(("family", "name"), CASES)
def test_replayed_features_equal_launched_ones(towers: Towers, family: Family):
    eager = towers.eager(torch.float32)
    replayed = ReplayedTower(eager, Recorder(DEVICE).record)
    layouts = towers.layouts([size for sizes in family.asked for size in sizes])
    for _ in range(4):
        items = towers.items(layouts)
        for some in (slice(0, 1), slice(0, 2), slice(0, None)):
            got, expected = (tower(items[some], layouts[some]) for tower in (replayed, eager))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert replayed.num_graphs == 1  # of the first picture, alone
    assert replayed.num_trunk_graphs > 1


@torch.inference_mode()
@pytest.mark.parametrize("max_patches", [1024, 16384])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_replayed_features_are_as_near_the_exact_ones_as_launched_ones(towers: Towers, max_patches: int):
    """In half precision, where matrix products of other sizes round in other ways."""
    exact, eager = towers.eager(torch.float32), towers.eager(torch.bfloat16)
    replayed: Any = ReplayedTower(eager, Recorder(DEVICE).record, max_patches)
    for _ in range(3):
        for sizes in MIXTURES:
            layouts = towers.layouts(sizes)
            items = towers.items(layouts)
            expected_MW, launched_MW, got_MW = (tower(items, layouts).float() for tower in (exact, eager, replayed))
            error, allowed = (got_MW - expected_MW).norm(), (launched_MW - expected_MW).norm()
            assert error <= 1.5 * allowed + 1e-3 * expected_MW.norm()
            for held_PD in replayed._trunk._inputs.values():  # what pads the next pass
                held_PD.fill_(100.0)
    assert replayed.num_trunk_graphs > 1  # the largest, and one for all passes where tiles are few and of one size


@torch.inference_mode()
@pytest.mark.parametrize(("family", "name"), CASES[:1])
def test_one_pool_holds_graphs_of_every_size(towers: Towers):
    """The largest is captured first, and those that follow take their memory from it."""
    torch.cuda.empty_cache()
    eager = towers.eager(torch.bfloat16)
    replayed = ReplayedTower(eager, Recorder(DEVICE).record)
    reserved: list[int] = []
    for count in (1, 2, 3, 5, 9, 20, 40, 80, 160, 320, 640):
        layouts = towers.layouts([(90, 70)] * count)
        replayed(towers.items(layouts), layouts)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert replayed.num_trunk_graphs > 5
    assert reserved[-1] - reserved[0] < 0.2 * (reserved[0] - torch.cuda.memory_allocated()) + 2**25
