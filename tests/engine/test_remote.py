"""The engine as a process: what it says, and what becomes of its requests when it says nothing any more."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin.config import EngineConfig, MediaConfig
from opsin.engine import child, messages, remote
from opsin.engine.channel import EngineEnd, FrontEnd
from opsin.engine.messages import pack_sources, unpack_sources
from opsin.engine.remote import RemoteEngine, Watch
from opsin.errors import EngineDeadError, EngineRestartError, UnsupportedModelError
from opsin.media.clips import FrameChoice, open_video
from opsin.media.prober import VideoProber
from opsin.media.source import EncodedPicture, PixelPicture, open_picture
from opsin.params import SamplingParams
from opsin.processing.embeddings import GivenFeatures, read_embedding
from opsin.processing.output import ENGINE_RESTARTED
from opsin.types import EngineRequest, RequestUpdate
from tests.engine import fake_process
from tests.engine.conftest import picture
from tests.media import clips

QUICK = Watch(silence_s=0.5, step_s=0.5)
PATIENT = Watch()
WANTED = threading.Event()


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "BOOTSTRAP", fake_process.BOOTSTRAP)


@contextmanager
def engine_that(behaviour: str, watch: Watch = PATIENT) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(EngineConfig.from_flat({"model": behaviour}), watch)
    try:
        yield engine
    finally:
        engine.close()


def test_process_that_was_started_already_is_the_first_one() -> None:
    with child.ChildProcess() as started:
        engine = RemoteEngine(EngineConfig.from_flat({"model": "answers"}), PATIENT, started)
        try:
            engine.wait_until_loaded(WANTED)
            assert engine.pid == started.process.pid
        finally:
            engine.close()


def test_process_that_is_never_told_anything_ends_with_its_context() -> None:
    with child.ChildProcess() as started:
        assert started.process.poll() is None
    assert started.process.returncode is not None
    assert started.connection.fileno() == -1


def request(name: str) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=[1, 2], params=SamplingParams())


def steps_until(engine: RemoteEngine, condition: Callable[[list[RequestUpdate]], bool]) -> list[RequestUpdate]:
    updates: list[RequestUpdate] = []
    deadline = time.monotonic() + 20
    while not condition(updates):
        assert time.monotonic() < deadline
        updates += engine.step()
    return updates


def test_sources_cross_to_the_process_and_answers_come_back():
    sources = [open_picture(picture(i), MediaConfig()) for i in range(2)]
    with engine_that("answers") as engine:
        engine.wait_until_loaded(WANTED)
        assert engine.facts == fake_process.FACTS
        assert engine.is_ready
        engine.add([request("a-0"), request("a-1")], sources)
        updates = steps_until(engine, lambda updates: len(updates) == 2)
        assert [update.error for update in updates] == [" ".join(s.digest.hex() for s in sources)] * 2
        steps_until(engine, lambda _: engine.stats()["num_requests_running"] == 1)


@pytest.mark.parametrize("most_inline", [0, 2**18], ids=["beside", "inline"])
def test_sources_are_what_they_were_on_the_other_side(monkeypatch: pytest.MonkeyPatch, most_inline: int):
    monkeypatch.setattr(messages, "_MAX_INLINE_BYTES", most_inline)
    config = MediaConfig()
    sources: list[Any] = [
        open_picture(_encoded(picture(1)), config),
        open_picture(picture(2, width=31, height=17).convert("RGBA"), config),
        read_embedding(np.arange(12, dtype=np.float16).reshape(3, 4), 4, extras={"image_sizes": (3, 4)}),
    ]
    arrived: list[Any] = unpack_sources(*pack_sources(sources))
    assert [source.digest for source in arrived] == [source.digest for source in sources]
    assert arrived[0] == sources[0]
    for there, here in zip(arrived[:2], sources[:2], strict=True):
        assert isinstance(there, EncodedPicture | PixelPicture)
        assert there.size == here.size
        assert there.decode().tobytes() == here.decode().tobytes()
    assert isinstance(arrived[2], GivenFeatures)
    np.testing.assert_array_equal(arrived[2].data, sources[2].data)
    assert arrived[2].extras == sources[2].extras
    assert unpack_sources(*pack_sources([])) == []


def test_videos_are_what_they_were_on_the_other_side():
    config = MediaConfig(media_workers=0)
    data = clips.encode(clips.frames(5))
    shown = (clips.frames(3), {"fps": 2.0, "total_num_frames": 9, "frames_indices": [0, 4, 8]})
    sources = [open_video(video, config, FrameChoice(4), VideoProber(config)) for video in (data, shown)]
    arrived: list[Any] = unpack_sources(*pack_sources(sources))
    assert arrived[0] == sources[0]
    for there, here in zip(arrived, sources, strict=True):
        assert (there.digest, there.clip) == (here.digest, here.clip)
        frames = zip(there.frames([0, 2]), here.frames([0, 2]), strict=True)
        assert all(ours.tobytes() == theirs.tobytes() for ours, theirs in frames)


def test_sources_leave_no_descriptors_behind():
    sources = [open_picture(picture(3), MediaConfig())]
    with engine_that("answers") as engine:
        engine.wait_until_loaded(WANTED)
        before = len(os.listdir("/proc/self/fd"))
        for i in range(20):
            engine.add([request(str(i))], sources)
        steps_until(engine, lambda updates: len(updates) == 20)
        assert len(os.listdir("/proc/self/fd")) == before


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ("refuses", UnsupportedModelError, "no such architecture"),
        ("dies at once", EngineDeadError, r"ended \(exit status 3\) while it loaded"),
        ("is killed at once", EngineDeadError, "SIGKILL.*memory"),
    ],
)
def test_process_that_cannot_load_says_why(behaviour: str, error: type[Exception], message: str):
    with engine_that(behaviour, QUICK) as engine, pytest.raises(error, match=message):
        engine.wait_until_loaded(WANTED)


@pytest.mark.parametrize(
    "behaviour",
    ["dies", "babbles", "nests without end", "lies about lengths", "falls silent", "is stuck"],
    ids=lambda b: b.replace(" ", "-"),
)
def test_request_of_a_process_that_fails_is_told_and_the_process_replaced(behaviour: str):
    with engine_that(behaviour, QUICK) as engine:
        engine.wait_until_loaded(WANTED)
        first = engine.pid
        engine.add([request("one"), request("two")], [])
        updates = steps_until(engine, lambda updates: len(updates) == 2)
        assert {update.request_id for update in updates} == {"one", "two"}
        assert {update.error_code for update in updates} == {ENGINE_RESTARTED}
        assert not engine.is_ready
        with pytest.raises(EngineRestartError):
            engine.add([request("three")], [])
        steps_until(engine, lambda _: engine.is_ready)
        assert engine.pid != first
        assert engine.stats()["num_engine_restarts_total"] == 1
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)


def test_process_that_says_nothing_is_not_ready_long_before_it_is_given_up():
    with engine_that("falls silent", Watch(silence_s=60)) as engine:
        engine.wait_until_loaded(WANTED)
        engine.add([request("one")], [])
        begun = time.monotonic()
        assert steps_until(engine, lambda _: not engine.is_ready) == []
        assert time.monotonic() - begun < 10
        assert engine.stats()["num_engine_restarts_total"] == 0


def test_process_that_does_not_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "_CLOSE_S", 0.2)
    with engine_that("stops reading", Watch()) as engine:
        engine.wait_until_loaded(WANTED)
        large = EngineRequest(request_id="large", prompt_token_ids=list(range(200_000)), params=SamplingParams())
        begun = time.monotonic()
        for _ in range(20):
            engine.add([large], [])
        assert time.monotonic() - begun < 10


def test_process_that_goes_on_dying_is_given_up():
    with engine_that("dies", Watch(max_deaths=2)) as engine:
        engine.wait_until_loaded(WANTED)
        engine.add([request("one")], [])
        steps_until(engine, lambda _: engine.is_ready and engine.stats()["num_engine_restarts_total"] == 1)
        engine.add([request("two")], [])
        with pytest.raises(EngineDeadError, match=r"ended 2 times .* exit status 7"):
            steps_until(engine, lambda _: False)


def test_front_that_stood_still_itself_does_not_blame_the_process(monkeypatch: pytest.MonkeyPatch):
    with engine_that("answers") as engine:
        engine.wait_until_loaded(WANTED)
        now = time.monotonic
        monkeypatch.setattr(remote.time, "monotonic", lambda: now() + 100)
        for _ in range(5):
            engine.step()
        assert engine.is_ready
        assert engine.stats()["num_engine_restarts_total"] == 0


def test_closing_ends_the_process():
    with engine_that("answers") as engine:
        engine.wait_until_loaded(WANTED)
        pid = engine.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    engine.wake()  # a late caller's is ignored


def test_request_that_cannot_be_sent_leaves_nothing_behind():
    sources = [open_picture(picture(3), MediaConfig())]
    impossible = request("huge")
    impossible.priority = 2**70
    with engine_that("answers") as engine:
        engine.wait_until_loaded(WANTED)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OverflowError):
            engine.add([impossible], sources)
        assert len(os.listdir("/proc/self/fd")) == before
        engine.add([request("small")], sources)
        steps_until(engine, lambda updates: len(updates) == 1)


def test_long_frame_is_copied_once_however_many_pieces_it_comes_in():
    ours, theirs = socket.socketpair()
    end = FrontEnd(ours)
    body = os.urandom(64 * 2**20)
    sender = threading.Thread(target=lambda: [EngineEnd(theirs).send(part) for part in (body, b"", b"after")])
    start_s = time.process_time()
    sender.start()
    frames: list[bytes] = []
    while len(frames) < 3:
        frames += [bytes(frame) for frame in end.receive()]
    sender.join()
    end.close()
    theirs.close()
    assert frames == [body, b"", b"after"]
    assert time.process_time() - start_s < 4
