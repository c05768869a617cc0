"""Pictures encoded beside the steps: the same answers, and answers that do not wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import opsin.engine.tower
from opsin import LLM, SamplingParams
from opsin.config import EngineConfig
from opsin.engine.build import build_engine
from opsin.engine.checkpoint import Checkpoint
from opsin.engine.local import LocalEngine
from opsin.engine.nice import SharedCores
from opsin.engine.tower import MovingTower, TowerThread
from opsin.errors import EngineDeadError
from opsin.runner.executor import Pixels
from opsin.types import MediaLayout, PixelPlan, View
from tests.engine.conftest import asked

_MAX_TOKENS = 6
GREEDY = SamplingParams(temperature=0, max_tokens=_MAX_TOKENS, ignore_eos=True)
_PLAN = PixelPlan(width=1, height=1, views=(View(ops=(), height=1, width=1),))
LAYOUT = MediaLayout(plan=_PLAN, num_features=1, num_patches=1)


class Tower:
    """A tower thread, and its encoder, which waits to be let through."""

    def __init__(self) -> None:
        self.begun, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.finished = threading.Semaphore(0)
        self.is_closed = False
        self.thread = TowerThread(self, self.finished.release)

    def encode(self, pixels: Pixels, layout: MediaLayout) -> np.ndarray:
        self.begun.release()
        assert self.gate.acquire(timeout=10)
        if self.is_closed:
            raise RuntimeError("ended")
        assert isinstance(pixels.data, np.ndarray)
        if pixels.data[0] == 0:
            raise RuntimeError("the tower fell")
        return pixels.data.astype(np.float32)[None]

    def is_loading(self) -> bool:
        return False

    def close(self) -> None:
        self.is_closed = True
        self.gate.release()

    def submit(self, *numbers: int) -> None:
        for number in numbers:
            self.thread.submit(b"%d" % number, (Pixels(np.array([number], np.uint8)), LAYOUT))

    def let_through(self, count: int) -> list[tuple[bytes, float]]:
        for _ in range(count):
            self.gate.release()
            assert self.finished.acquire(timeout=10)
        return [(key, features.data.item()) for key, features in self.thread.poll()]


@pytest.fixture
def tower() -> Iterator[Tower]:
    tower = Tower()
    yield tower
    tower.thread.close()


def test_tower_encodes_in_order_and_reports_each_item_once(tower: Tower) -> None:
    tower.submit(3, 1, 2)
    assert tower.thread.poll() == []
    assert tower.let_through(3) == [(b"3", 3.0), (b"1", 1.0), (b"2", 2.0)]
    assert tower.thread.poll() == []


def test_tower_cancelled_item_that_waits_is_never_encoded(tower: Tower) -> None:
    tower.submit(1, 2, 3)
    assert tower.begun.acquire(timeout=10)
    tower.thread.cancel(b"2")
    assert tower.let_through(2) == [(b"1", 1.0), (b"3", 3.0)]


def test_tower_that_fails_ends_the_engine(tower: Tower, caplog: pytest.LogCaptureFixture) -> None:
    tower.submit(0)
    with pytest.raises(EngineDeadError, match="the tower fell"):
        tower.let_through(1)
    assert "The vision tower failed" in caplog.text


def test_tower_closed_in_the_middle_of_an_item_ends_at_once_without_a_word(
    tower: Tower, caplog: pytest.LogCaptureFixture
) -> None:
    tower.submit(1, 2)
    assert tower.begun.acquire(timeout=10)
    tower.thread.close()
    assert not tower.begun.acquire(blocking=False)
    assert tower.thread.poll() == []
    assert not caplog.records


class Process:
    """What ``MovingTower`` takes for a ``RemoteTower``."""

    def __init__(self, *loaded: bool) -> None:
        self.loaded = list(loaded)
        self.is_closed = False

    def is_loaded(self) -> bool:
        return self.loaded.pop(0) if len(self.loaded) > 1 else self.loaded[0]

    def is_loading(self) -> bool:
        return not self.is_loaded()

    def encode(self, pixels: Pixels, layout: MediaLayout) -> np.ndarray:
        return np.asarray(pixels.data) + 100.0

    def close(self) -> None:
        self.is_closed = True


def moving(process: Process, news: list[str], *, is_started: bool = False) -> MovingTower:
    """A tower whose own features are the pixels, and those of its process a hundred more."""
    there: Any = process

    def start() -> Any:
        news.append("started")
        return process

    return MovingTower(
        lambda pixels, _: np.asarray(pixels.data) + 0.0,
        start,
        lambda: news.append("moved"),
        there if is_started else None,
    )


@pytest.mark.parametrize("is_started", [False, True], ids=["on demand", "from the start"])
def test_tower_is_here_until_its_process_is_loaded(is_started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opsin.engine.tower, "_WORTH_S", 0.0)
    news: list[str] = []
    process = Process(False, False, False, True)
    tower = moving(process, news, is_started=is_started)
    features = [tower.encode(Pixels(np.array([n], np.uint8)), LAYOUT).item() for n in range(2)]
    assert tower.is_loading()
    features += [tower.encode(Pixels(np.array([n], np.uint8)), LAYOUT).item() for n in range(2, 5)]
    assert not tower.is_loading()
    assert features == [0, 1, 102, 103, 104]
    assert news == (["moved"] if is_started else ["started", "moved"])
    tower.close()
    assert process.is_closed


def test_tower_starts_no_process_for_few_pictures_or_when_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    news: list[str] = []
    tower = moving(Process(), news)
    picture = Pixels(np.array([1], np.uint8)), LAYOUT
    assert [tower.encode(*picture).item() for _ in range(3)] == [1, 1, 1]
    tower.close()
    monkeypatch.setattr(opsin.engine.tower, "_WORTH_S", 0.0)
    assert tower.encode(*picture).item() == 1
    assert news == []


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LocalEngine]:
    config = EngineConfig.from_flat({"model": str(folder), "media_workers": 0, "max_num_tokens_beside_decodes": 8})
    engine = build_engine(config, Checkpoint.open(config), encodes_beside=True)
    yield engine
    engine.close()


def prepared(llm: LLM, name: str, prompt: Any) -> Any:
    return llm._front.inputs.process(name, llm._front.read_prompt(prompt), GREEDY)


def answers(engine: LocalEngine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for update in engine.step():
            assert update.finish_reason != "error", update.error
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
    return tokens


def test_engine_that_encodes_beside_its_steps_answers_the_same(llm: LLM, engine: LocalEngine) -> None:
    prompts = [asked(1), asked(2, 3), asked(1, 2, 4), "Hello there"]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    for i, prompt in enumerate(prompts):
        processed = prepared(llm, f"{i}", prompt)
        engine.add([processed.request], processed.sources)
    got = answers(engine)
    assert [got[f"{i}"] for i in range(4)] == expected
    assert engine.stats()["payload_bytes_pending"] == 0
    assert sum(engine.histograms()["encode_step_seconds"].counts) == 4  # each picture once


def test_text_goes_on_while_the_tower_is_busy(
    llm: LLM, engine: LocalEngine, tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(engine, "_cores", SharedCores(4, 1, used.append))
    monkeypatch.setattr(engine.feeder, "_tower", tower.thread)  # one that does not move
    picture, text = prepared(llm, "picture", asked(5)), prepared(llm, "text", "Hello there")
    engine.add([picture.request], picture.sources)
    while not tower.begun.acquire(blocking=False):
        engine.step()
    engine.add([text.request], text.sources)
    tokens: list[int] = []
    while len(tokens) < _MAX_TOKENS:
        for update in engine.step():
            assert update.request_id == "text"
            tokens += update.token_ids
    engine.abort("picture")
    assert not engine.has_work
    assert not engine.feeder.is_waiting or engine.step() == []
    assert used == [3]  # of four cores, beside the tower
    engine.add([text.request], text.sources)
    answers(engine)
    assert used == [3, 4]


def test_cores_are_never_shared_down_to_none() -> None:
    used: list[int] = []
    cores = SharedCores(1, 1, used.append)
    for is_shared in (False, True, True, False):
        cores.share(is_shared)
    assert used == []
