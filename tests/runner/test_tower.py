"""When a whole pass through the tower is replayed, and that it reads the new picture with the old sizes' numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from opsin.layers.staging import noting, upload
from opsin.runner import kept
from opsin.runner import tower as module
from opsin.runner.executor import Pixels
from opsin.runner.tower import EagerTower, ReplayedTower
from opsin.types import MediaLayout, PixelPlan, Resize, View

CPU = torch.device("cpu")


class Model:
    """Features are each tile's sum, times a number that the host works out from the sizes and uploads."""

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, tiles: Any, layouts: Any) -> torch.Tensor:
        self.calls += 1
        (widths,) = upload([np.array([item[0].shape[1] for item in tiles])], CPU)
        return (
            torch.stack([torch.stack([tile.long().sum() for tile in item]).sum() for item in tiles])[:, None] * widths
        )


class Replay:
    """Stands for a CUDA graph: does the work again, into the same memory."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self.work = work
        self.result = work()

    def replay(self) -> None:
        self.result.copy_(self.work())


def record(work: Callable[[], torch.Tensor], *, warm_up: bool) -> tuple[Replay, torch.Tensor]:
    with noting() as uploads:
        graph = Replay(work)
    assert not uploads  # a graph must not copy from the host
    return graph, graph.result


def layout(width: int, height: int, num_patches: int = 4) -> MediaLayout:
    return MediaLayout(PixelPlan(width, height, (View((), height, width),)), 1, num_patches)


def pixels(width: int, height: int, seed: int) -> Pixels:
    return Pixels(np.random.default_rng(seed).integers(0, 256, width * height * 3, dtype=np.uint8))


def run(tower: ReplayedTower, *sizes: tuple[int, int], seed: int) -> None:
    """One pass, held to what a model of its own makes of the same pictures."""
    items = [pixels(*size, seed + i) for i, size in enumerate(sizes)]
    layouts = [layout(*size) for size in sizes]
    got = tower(items, layouts)
    expected: Any = Model()
    assert torch.equal(got, EagerTower(expected, CPU)(items, layouts))


def sizes_of(width: int, height: int) -> Any:
    """What the graph of a picture is found by."""
    return ((height, width),), 1, (), 1


@pytest.fixture
def tower() -> ReplayedTower:
    model: Any = Model()
    return ReplayedTower(EagerTower(model, CPU), record)


def test_sizes_that_come_again_are_captured_and_then_replayed(tower: ReplayedTower):
    for seed in range(5):
        run(tower, (8, 4), seed=10 * seed)
        run(tower, (4, 8), seed=10 * seed)
        assert tower.num_graphs == (0 if seed == 0 else 2)


def test_pass_of_several_pictures_is_not_captured_whole(tower: ReplayedTower):
    for seed in range(3):
        run(tower, (4, 8), (8, 4), seed=10 * seed)
    assert tower.num_graphs == 0


def test_result_of_a_replay_outlives_the_next_one(tower: ReplayedTower):
    for seed in range(2):
        run(tower, (8, 4), seed=seed)
    first = tower([pixels(8, 4, 5)], [layout(8, 4)])
    before = first.clone()
    tower([pixels(8, 4, 6)], [layout(8, 4)])
    assert torch.equal(first, before)


def test_raw_pictures_are_resized_into_what_a_replay_reads(tower: ReplayedTower):
    """The graph does not care which road a picture came by, nor of which size it was."""

    def shrunk(width: int, height: int) -> MediaLayout:
        return MediaLayout(PixelPlan(width, height, (View((Resize(8, 4),), 4, 8),)), 1, 4)

    for seed, (width, height) in enumerate([(20, 10), (9, 5), (8, 7), (30, 40)]):
        raw = Pixels(pixels(width, height, seed).data, is_raw=True)
        for item, of in ((raw, shrunk(width, height)), (pixels(8, 4, 10 + seed), layout(8, 4))):
            expected: Any = Model()
            assert torch.equal(tower([item], [of]), EagerTower(expected, CPU)([item], [of]))
        assert tower.num_graphs == 1


def test_large_pass_is_never_captured(tower: ReplayedTower):
    for seed in range(3):
        tower([pixels(8, 4, seed)], [layout(8, 4, num_patches=5000)])
    assert tower.num_graphs == 0


def test_graphs_are_few_and_an_idle_one_makes_way(tower: ReplayedTower, monkeypatch: pytest.MonkeyPatch):
    tower._graphs._most = 2
    monkeypatch.setattr(kept, "_IDLE_PASSES", 4)
    for width in (4, 8, 12):
        for seed in range(2):
            run(tower, (width, 4), seed=seed)
    assert tower.num_graphs == 2
    for seed in range(4):
        run(tower, (8, 4), seed=seed)
        run(tower, (12, 4), seed=seed)
    assert tower.num_graphs == 2
    assert tower._graphs.find(sizes_of(8, 4)) is not None
    assert tower._graphs.find(sizes_of(12, 4)) is not None  # 4 wide was idle


def test_what_was_met_is_forgotten_in_time(tower: ReplayedTower, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 4)
    for width in range(4, 12):
        run(tower, (width, 4), seed=0)
    assert len(tower._met) == 4
    run(tower, (4, 4), seed=1)
    assert tower.num_graphs == 0


def test_tower_that_cannot_be_captured_goes_on_without(caplog: pytest.LogCaptureFixture):
    def refuse(work: Callable[[], torch.Tensor], *, warm_up: bool) -> Any:
        raise RuntimeError("operation not permitted")

    model: Any = Model()
    tower = ReplayedTower(EagerTower(model, CPU), refuse)
    for seed in range(4):
        run(tower, (8, 4), seed=seed)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "operation not permitted" in caplog.text
