"""The vision tower in a process of its own: the same features, bit for bit; and its end, the engine's, and theirs."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from opsin import LLM
from opsin.config import EngineConfig
from opsin.engine import build
from opsin.engine.build import build_engine
from opsin.engine.checkpoint import Checkpoint
from opsin.engine.local import LocalEngine
from opsin.engine.remote_tower import RemoteTower, TowerLoad
from opsin.engine.tower import MovingTower
from opsin.errors import ConfigError, EngineDeadError
from opsin.models.load import load_model, without_tower
from opsin.runner.executor import Pixels
from opsin.runner.tower import EagerTower
from opsin.types import Clip, MediaLayout
from tests.engine.conftest import asked
from tests.engine.test_tower import GREEDY, answers, prepared
from tests.factories.qwen3_vl import Qwen3VLShape, write_qwen3_vl
from tests.server.test_engine_process import is_gone, wait_for

_CPU = torch.device("cpu")


class Case(NamedTuple):
    """A checkpoint, settings of it, and the layouts of what it is to encode."""

    folder: Path
    settings: dict[str, Any]

    def config(self) -> EngineConfig:
        return EngineConfig.from_flat({"model": str(self.folder), "media_workers": 0, **self.settings})

    def load(self) -> TowerLoad:
        config = self.config()
        checkpoint = Checkpoint.open(config)
        return build._tower_load(config, checkpoint, build.resolve_dtype(config.model, checkpoint.files, _CPU))


def spawn(case: Case) -> RemoteTower:
    """With as many threads as this process has, by which products may be split, and rounded."""
    tower = RemoteTower(msgspec.structs.replace(case.load(), num_threads=torch.get_num_threads()))
    wait_for(tower.is_loaded)
    return tower


def items(case: Case) -> list[tuple[Pixels, MediaLayout]]:
    """Pictures of several sizes, and a video where the family takes any."""
    rule = Checkpoint.open(case.config()).rule
    layouts = [rule.layout("image", width, height, 1, {}) for width, height in ((50, 40), (97, 61))]
    if rule.max_items("video") != 0:
        layouts.append(rule.video_layout(Clip(width=56, height=56, num_frames=4, frames=(0, 1, 2, 3), fps=2.0), {}))
    rng = np.random.default_rng(0)
    return [(Pixels(rng.integers(0, 256, layout.plan.num_bytes, dtype=np.uint8)), layout) for layout in layouts]


def in_this_process(case: Case) -> EagerTower:
    config = case.config()
    checkpoint = Checkpoint.open(config)
    model = load_model(
        checkpoint.files,
        checkpoint.rule.norm,
        device=_CPU,
        dtype=build.resolve_dtype(config.model, checkpoint.files, _CPU),
        load_format=config.model.load_format,
        quantization=config.model.quantization,
        seed=config.model.seed,
    )
    return EagerTower(model, _CPU)


@pytest.fixture(scope="module", params=["llava", "llava, dummy, int8", "qwen3_vl"])
def case(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param == "qwen3_vl":  # features for deeper layers, videos, layouts whose numbers count
        return Case(write_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"), Qwen3VLShape(max_pixels=12 * 32**2)), {})
    dummy = {"load_format": "dummy", "quantization": "int8", "dtype": "bfloat16", "seed": 3}
    return Case(folder, dummy if "dummy" in request.param else {})


def test_features_are_those_of_a_tower_in_this_process_bit_for_bit(case: Case) -> None:
    inline = in_this_process(case)
    descriptors = len(os.listdir("/proc/self/fd"))
    tower = spawn(case)
    try:
        for pixels, layout in items(case):
            with torch.inference_mode():
                expected = inline([pixels], [layout]).float().numpy()
            got = tower.encode(pixels, layout)
            assert got.dtype == np.float32
            assert expected.std() > 0
            np.testing.assert_array_equal(got, expected)
    finally:
        tower.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_models_without_decoder_and_without_tower_hold_nothing_of_the_other(folder: Path) -> None:
    checkpoint = Checkpoint.open(Case(folder, {}).config())
    settings: Any = {"device": _CPU, "dtype": torch.float32}
    whole, decoder = (load_model(checkpoint.files, checkpoint.rule.norm, **settings) for _ in range(2))
    encoder = load_model(checkpoint.files, checkpoint.rule.norm, **settings, has_decoder=False)
    without_tower(decoder)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (whole, encoder, decoder)]
    assert sizes[0] == sizes[1] + sizes[2]
    assert min(sizes) > 0
    assert isinstance(decoder, torch.nn.Module)
    assert [name for name, _ in decoder.named_children()] == ["decoder"]


@pytest.fixture
def tower(folder: Path) -> Iterator[RemoteTower]:
    tower = spawn(Case(folder, {}))
    yield tower
    tower.close()


def test_tower_outlives_signals_that_are_for_its_engine_and_a_killed_one_is_told_of(
    tower: RemoteTower, folder: Path
) -> None:
    ((pixels, layout), *_) = items(Case(folder, {}))
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(tower.pid, number)
    assert len(tower.encode(pixels, layout)) == layout.num_features
    os.kill(tower.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"ended \(signal SIGKILL\)"):
        tower.encode(pixels, layout)


def test_tower_that_fails_tells_why_and_ends(tower: RemoteTower, folder: Path) -> None:
    ((pixels, layout), *_) = items(Case(folder, {}))
    with pytest.raises(EngineDeadError, match="RuntimeError: split_with_sizes"):
        tower.encode(Pixels(pixels.data[:-3]), layout)
    wait_for(lambda: is_gone(tower.pid))


def test_tower_ends_with_its_engine_though_it_is_at_work(folder: Path) -> None:
    tower = RemoteTower(Case(folder, {}).load())  # which it loads, when it comes to that
    tower._connection.close()  # as the kernel does when a process ends
    wait_for(lambda: is_gone(tower.pid))
    tower.close()


def test_tower_that_another_thread_has_closed_is_not_loading(folder: Path) -> None:
    tower = RemoteTower(Case(folder, {}).load())
    assert tower.is_loading()
    tower.close()
    assert not tower.is_loading()


def test_tower_that_cannot_be_loaded_tells_why(folder: Path, tmp_path: Path) -> None:
    elsewhere = msgspec.structs.replace(Case(folder, {}).load(), folder=str(tmp_path))
    tower = RemoteTower(elsewhere)
    try:
        with pytest.raises(EngineDeadError, match=r"WeightError: .* holds no weights"):
            wait_for(tower.is_loaded)
    finally:
        tower.close()


def test_engine_whose_tower_was_killed_stops_as_after_a_failed_step(
    llm: LLM, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (expected,) = llm.generate([asked(1)], GREEDY, use_tqdm=False)
    config = Case(folder, {}).config()
    engine = build_engine(config, Checkpoint.open(config), encodes_beside=True, serves=True)
    try:
        process = process_of(engine)
        wait_for(process.is_loaded)
        for name in ("before", "after"):
            asking = prepared(llm, name, asked(1 if name == "before" else 2))
            engine.add([asking.request], asking.sources)
            if name == "before":
                assert answers(engine)[name] == expected.outputs[0].token_ids
                os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match=r"The vision tower failed: its process has ended \(signal SIGKILL\)"):
            answers(engine)
    finally:
        engine.close()
    assert "The vision tower failed; the engine stops." in caplog.text


def test_pictures_are_encoded_here_where_the_process_for_them_died_while_it_was_loading(
    llm: LLM, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, picture = prepared(llm, "text", "Hello there"), prepared(llm, "picture", asked(1))
    expected = [
        output.outputs[0].token_ids for output in llm.generate(["Hello there", asked(1)], GREEDY, use_tqdm=False)
    ]
    config = Case(folder, {}).config()
    engine = build_engine(config, Checkpoint.open(config), encodes_beside=True, serves=True)
    try:
        process = process_of(engine)
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not process.is_loading())
        engine.add([text.request], text.sources)
        assert answers(engine)["text"] == expected[0]
        engine.add([picture.request], picture.sources)
        assert answers(engine)["picture"] == expected[1]
        assert is_gone(process.pid)
    finally:
        engine.close()
    assert "the process for them failed: its process has ended (signal SIGKILL)" in caplog.text


def test_engine_that_cannot_be_built_leaves_no_tower_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    started = build.RemoteTower

    def start(load: TowerLoad) -> RemoteTower:
        tower = started(load)
        pids.append(tower.pid)
        return tower

    monkeypatch.setattr(build, "RemoteTower", start)
    config = Case(folder, {"kv_cache_memory_bytes": 1}).config()
    with pytest.raises(ConfigError, match="KV cache"):
        build_engine(config, Checkpoint.open(config), encodes_beside=True, serves=True)
    assert len(pids) == 1
    assert is_gone(pids[0])


def process_of(engine: LocalEngine) -> RemoteTower:
    tower = engine.feeder._tower
    assert tower is not None
    assert isinstance(tower._encoder, MovingTower)
    assert tower._encoder._there is not None
    return tower._encoder._there
