"""Every family's tower replayed from a CUDA graph: for new pictures of known sizes, the features of one launched."""

from __future__ import annotations

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
from tests.factories.families import FAMILIES

pytestmark = pytest.mark.gpu

CASES = [pytest.param(row, name, id=f"{row.name}-{name}") for row in FAMILIES for name in row.towers]


@torch.inference_mode()
@pytest.mark.parametrize(("family", "name"), CASES)
def test_replayed_features_equal_launched_ones(family: Any, name: str, tmp_path: Path):
    folder = family.write(tmp_path, family.shapes[name])
    files = find_model(str(folder))
    resolved = resolve(files.config)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rule = resolved.load_rule().from_hf(files.config, files.processor, tokenizer)
    device = torch.device("cuda")
    eager = EagerTower(load_model(files, rule.norm, device=device, dtype=torch.float32), device)
    replayed = ReplayedTower(eager, Recorder(device).record)
    layouts = [rule.layout("image", *size, 1, {}) for sizes in family.asked for size in sizes]
    random = np.random.default_rng(0)
    for _ in range(4):
        items = [Pixels(random.integers(0, 256, layout.plan.num_bytes, dtype=np.uint8)) for layout in layouts]
        for some in (slice(0, 1), slice(0, None)):
            got, expected = (tower(items[some], layouts[some]) for tower in (replayed, eager))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert replayed.num_graphs == len({1, len(layouts)})
