"""Passes through every family's tower with the blocks from graphs: for any pictures, the features of a launched pass.

No GPU is needed; ``tests.runner.recorded`` stands for its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from opsin.models import resolve
from opsin.models.hub import find_model
from opsin.models.load import load_model
from opsin.models.towers import trunk as launched
from opsin.models.towers.attention import Segments
from opsin.runner import kept
from opsin.runner.executor import Pixels
from opsin.runner.tower import EagerTower, ReplayedTower
from opsin.runner.trunk import TrunkGraphs, padded, padded_size
from opsin.types import MediaLayout
from tests.factories import minicpmv
from tests.factories.families import FAMILIES
from tests.runner.recorded import Recorder

CPU = torch.device("cpu")
# Mixtures of pictures, the first of which meet graphs that are not there yet.
MIXTURES = (
    [(90, 70), (200, 33)],
    [(40, 60), (30, 30), (33, 200)],
    [(90, 70)],
    [(30, 30)] * 3,
    [(33, 200), (90, 70), (30, 30)],
    [(200, 33), (90, 70)],
    [(30, 30), (33, 200), (40, 60)],
)
CASES = [pytest.param(row.write, row.shapes[name], id=f"{row.name}-{name}") for row in FAMILIES for name in row.towers]
CASES.append(pytest.param(minicpmv.write_minicpmv, minicpmv.SHAPES["plain"], id="minicpmv"))


@torch.inference_mode()
@pytest.mark.parametrize(("write", "shape"), CASES)
def test_features_of_any_mixture_equal_launched_ones(write: Callable[..., Path], shape: Any, tmp_path: Path):
    folder = write(tmp_path, shape)
    files = find_model(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rule = resolve(files.config).load_rule().from_hf(files.config, files.processor, tokenizer)
    model = load_model(files, rule.norm, device=CPU, dtype=torch.float32, kernels="reference")
    recorder, eager = Recorder(is_strict=True), EagerTower(model, CPU)
    replayed: Any = ReplayedTower(eager, recorder.record)
    random = np.random.default_rng(0)
    for sizes in MIXTURES:
        layouts: list[MediaLayout] = [rule.layout("image", *size, 1, {}) for size in sizes]
        items = [Pixels(random.integers(0, 256, layout.plan.num_bytes, dtype=np.uint8)) for layout in layouts]
        torch.testing.assert_close(replayed(items, layouts), eager(items, layouts), rtol=1e-5, atol=2e-5)
        for held_PD in replayed._trunk._inputs.values():  # what pads the next pass
            held_PD.fill_(100.0)
    assert replayed.num_graphs == 0
    assert replayed.num_trunk_graphs == len(recorder.graphs) < len(MIXTURES)
    assert sum(graph.num_replays for graph in recorder.graphs) >= 2


class Sums:
    """A trunk whose patches see the sum of their segment, in one table and the other, and that merges two of them."""

    def __init__(self) -> None:
        self.num_calls = 0

    def trunk(self, x_PD: torch.Tensor, segments: Sequence[Segments], numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        self.num_calls += 1
        (factors_P,) = numbers
        seen_PD = x_PD * factors_P.unsqueeze(1)
        for ends_B1, lens in segments:
            if lens is not None:
                assert ends_B1.diff().tolist() == list(lens)
            at_P = torch.arange(len(x_PD), dtype=torch.int32)
            row_P = torch.bucketize(at_P, ends_B1, right=True)
            seen_PD = (row_P.unsqueeze(1) == row_P).to(x_PD.dtype) @ seen_PD
        return seen_PD.unflatten(0, (-1, 2)).sum(1)


def passes(trunk: Any, *lens: tuple[int, ...], seed: int = 0) -> tuple[Any, ...]:
    """What a trunk is run with; patches of whole numbers, so that sums are exact."""
    random = torch.Generator().manual_seed(seed)
    num_patches = sum(lens[0])
    x_PD = torch.randint(-3, 4, (num_patches, 4), generator=random).float()
    factors_P = np.random.default_rng(seed).integers(1, 4, num_patches).astype(np.float32)
    return trunk, x_PD, lens, [factors_P]


def check(graphs: TrunkGraphs, *lens: tuple[int, ...], seed: int) -> None:
    case = passes(Sums().trunk, *lens, seed=seed)
    assert torch.equal(graphs(TRUNK.trunk, *case[1:]), launched.launch(*case))


TRUNK = Sums()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(is_strict=True)


@pytest.fixture
def graphs(recorder: Recorder) -> TrunkGraphs:
    """Of passes of up to 512 patches."""
    return TrunkGraphs(recorder.record, CPU, 500)


def test_one_graph_serves_every_division_of_its_patches(graphs: TrunkGraphs, recorder: Recorder):
    divisions = [((100,), (60, 40)), ((70, 2, 30), (102,)), ((128,), (64, 64)), ((1, 1), (2,)), ((40, 60), (50, 50))]
    for seed, lens in enumerate(divisions):
        check(graphs, *lens, seed=seed)
    assert len(graphs) == 2  # the largest, that comes first, and theirs
    assert [graph.num_replays for graph in recorder.graphs] == [0, len(divisions) - 1]


def test_more_segments_than_a_graph_has_room_for_get_one_of_their_own(graphs: TrunkGraphs):
    for seed in range(3):
        check(graphs, (20,) * 5, (100,), seed=seed)  # tables have room for 16 segments, or 32
        check(graphs, (20,) * 5, (5,) * 20, seed=seed)
        check(graphs, (6,) * 16, (96,), seed=seed)  # the seventeenth pads
        check(graphs, (6,) * 15, (90,), seed=seed)
    assert len(graphs) == 4


def test_larger_pass_than_is_planned_for_is_launched(graphs: TrunkGraphs):
    trunk = Sums()
    for seed in range(2):
        graphs(*passes(trunk.trunk, (513,) * 2, (1026,), seed=seed))
    assert (trunk.num_calls, len(graphs)) == (2, 0)
    check(graphs, (512,), (512,), seed=1)
    assert len(graphs) == 1


def test_result_of_a_replay_outlives_the_next(graphs: TrunkGraphs):
    for seed in range(2):
        check(graphs, (8, 4), (12,), seed=seed)
    case = passes(TRUNK.trunk, (8, 4), (12,), seed=2)
    first = graphs(*case)
    before = first.clone()
    check(graphs, (4, 8), (12,), seed=3)
    assert torch.equal(first, before)


def test_graphs_are_few_and_an_idle_one_makes_way(graphs: TrunkGraphs, monkeypatch: pytest.MonkeyPatch):
    graphs._graphs._most = 2
    monkeypatch.setattr(kept, "_IDLE_PASSES", 3)
    check(graphs, (100,), (100,), seed=0)  # and the largest
    calls = TRUNK.num_calls
    for seed in range(5):
        check(graphs, (200,), (200,), seed=seed)
        check(graphs, (100,), (100,), seed=seed)
    # Launched; then, in the place of the largest, for which nobody asked, run once and captured; then replayed.
    assert TRUNK.num_calls == calls + 1 + 2
    assert len(graphs) == 2


def test_trunk_that_cannot_be_captured_goes_on_without(caplog: pytest.LogCaptureFixture):
    def refuse(work: Callable[[], torch.Tensor], *, warm_up: bool) -> Any:
        raise RuntimeError("operation not permitted")

    graphs = TrunkGraphs(refuse, CPU, 500)
    for seed in range(3):
        check(graphs, (100,), (100,), seed=seed)
    assert ["operation not permitted" in record.message for record in caplog.records] == [True]
    assert len(graphs) == 0


def test_sizes_waste_little_and_hold_every_pass():
    for num_patches in range(1, 16385):
        size = padded_size(num_patches)
        assert num_patches <= size < num_patches + max(128, num_patches / 8)
    assert len({padded_size(num_patches) for num_patches in range(1, 8193)}) == 48


def test_what_pads_is_a_segment_of_its_own():
    table, numbers = padded(128, 12, [(8, 4)], [np.ones((6, 3), np.int32)])
    assert table.tolist() == [0, 8, 12, *[128] * 14]
    assert numbers.shape == (64, 3)
    assert numbers[:6].all()
    assert not numbers[6:].any()
