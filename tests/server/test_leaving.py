"""Clients that leave, stage by stage, counted in steps: at most two that were begun later hold a row of theirs."""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from fastapi import FastAPI

from opsin import AsyncLLM
from opsin.engine import build
from opsin.engine.local import LocalEngine
from opsin.runner.executor import PendingStep
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.types import StepPlan
from tests.server.conftest import NAME, assert_idle, chat, serving
from tests.server.test_life import send, wait_for

if TYPE_CHECKING:
    from tests.factory import LlavaShape

PATIENCE_S = 30
MANY: dict[str, Any] = {"max_tokens": 300, "n": 16, "temperature": 1}  # thousands of steps, one answer at a time
FORM: dict[str, Any] = {"structured_outputs": {"regex": "[ab]{300}"}}


class Turnstile:
    """Stands before an engine's steps: notes what they run, and holds up the first that a test waits for."""

    def __init__(self, engine: LocalEngine) -> None:
        self._executor = engine.core.executor
        self._launch = self._executor.launch
        self._is_awaited: Callable[[StepPlan], bool] = lambda plan: False
        self._reached, self._open = threading.Event(), threading.Event()
        self.plans: list[StepPlan] = []
        self._executor.launch = self._pass  # type: ignore[method-assign]

    def _pass(self, plan: StepPlan) -> PendingStep:
        if self._is_awaited(plan):
            self._is_awaited = lambda plan: False
            self._reached.set()
            assert self._open.wait(PATIENCE_S)
        self.plans.append(plan)
        return self._launch(plan)

    def hold(self, is_awaited: Callable[[StepPlan], bool]) -> None:
        """Hold up the first step of which this is true."""
        self._reached.clear()
        self._open.clear()
        self._is_awaited = is_awaited

    def wait(self) -> None:
        """Until that step stands here."""
        assert self._reached.wait(PATIENCE_S)

    def release(self) -> None:
        """Let it go on, and all others; from here on they are noted anew."""
        self.plans.clear()
        self._open.set()


class House(NamedTuple):
    """A server over an engine that encodes pictures beside its steps, as one on a CPU does."""

    address: str
    app: FastAPI
    llm: AsyncLLM
    engine: LocalEngine
    turnstile: Turnstile

    def leave(self, connection: socket.socket) -> None:
        """Close a connection; when this returns, the server has told the engine's thread."""
        before = self.app.state.server.admission.num_admitted
        connection.close()
        wait_for(lambda: self.app.state.server.admission.num_admitted < before)

    def assert_empty(self) -> None:
        """All has come back, pictures on their way included."""
        assert_idle(self.app, self.llm)
        names = ("num_steps_in_flight", "payload_bytes_pending", "num_pictures_decoding")
        wait_for(lambda: not any(self.llm.stats()[name] for name in names))


@pytest.fixture(scope="module", params=[1, 2], ids=["depth1", "depth2"])
def house(request: pytest.FixtureRequest, tiny_llava: Callable[[LlavaShape], Path]) -> Iterator[House]:
    from tests.factory import LlavaShape

    folder = tiny_llava(LlavaShape(num_kv_heads=2))
    settings: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "pipeline_depth": request.param}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_engine", functools.partial(build.build_engine, encodes_beside=True))
        llm = AsyncLLM(str(folder), media_workers=0, enable_prefix_caching=False, vision_cache_gb=0.001, **settings)
    with llm:
        engine = llm._front.engine
        assert isinstance(engine, LocalEngine)
        app = create_app(llm, ServerConfig(), model=NAME)
        with serving(app) as address:
            yield House(address, app, llm, engine, Turnstile(engine))


@pytest.fixture(params=[False, True], ids=["whole", "stream"])
def stream(request: pytest.FixtureRequest) -> bool:
    return request.param


def is_within_prompt(plan: StepPlan) -> bool:
    return any(row.start > 0 and not row.emits for row in plan.rows)


def is_within_answer(plan: StepPlan) -> bool:
    return any(row.num_tokens == 1 and row.emits for row in plan.rows)


def is_under_a_grammar(plan: StepPlan) -> bool:
    return any(row.num_tokens == 1 and row.mask is not None for row in plan.rows)


@pytest.mark.parametrize(
    ("is_there", "fields"),
    [(is_within_prompt, {}), (is_within_answer, {}), (is_under_a_grammar, FORM)],
    ids=["prompt", "answer", "grammar"],
)
def test_client_that_leaves_a_running_request_costs_two_steps_at_most(
    house: House, stream: bool, is_there: Callable[[StepPlan], bool], fields: dict[str, Any]
):
    house.turnstile.hold(is_there)
    connection = send(house.address, chat("word " * 40, stream=stream, max_tokens=300, **fields))
    house.turnstile.wait()
    house.leave(connection)
    house.turnstile.release()
    house.assert_empty()
    assert len([plan for plan in house.turnstile.plans if plan.rows]) <= 2  # the one that was held up is among them


def test_client_that_leaves_in_line_is_never_run(house: House, stream: bool):
    running = send(house.address, chat(stream=True, **MANY))
    house.turnstile.hold(lambda plan: house.llm.stats()["num_requests_waiting"] == 16)  # 15 of the first one's answers
    waiting = send(house.address, chat("word " * 40, stream=stream))
    house.turnstile.wait()
    house.leave(waiting)
    house.turnstile.release()
    wait_for(lambda: house.llm.stats()["num_requests_waiting"] <= 15)
    assert all(opened.num_prompt_tokens < 40 for plan in house.turnstile.plans for opened in plan.opened)
    house.leave(running)
    house.assert_empty()


def test_client_that_leaves_while_its_picture_is_decoded_is_never_run(
    house: House, stream: bool, monkeypatch: pytest.MonkeyPatch
):
    asked = threading.Event()
    pool = house.engine.feeder._pool
    submit, poll = pool.submit, pool.poll

    def submit_and_tell(*job: Any) -> None:
        submit(*job)
        asked.set()

    monkeypatch.setattr(pool, "submit", submit_and_tell)
    monkeypatch.setattr(pool, "poll", list)  # nothing is ever decoded
    house.turnstile.release()
    connection = send(house.address, chat(1, stream=stream))
    assert asked.wait(PATIENCE_S)
    house.leave(connection)
    house.assert_empty()
    monkeypatch.setattr(pool, "poll", poll)
    assert pool.num_pending == 0
    assert house.turnstile.plans == []


def test_client_that_leaves_while_its_picture_is_encoded_is_never_run(
    house: House, stream: bool, monkeypatch: pytest.MonkeyPatch
):
    tower = house.engine.feeder._tower
    assert tower is not None
    encode = tower._encoder.encode
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def held(*item: Any) -> Any:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return encode(*item)

    monkeypatch.setattr(tower._encoder, "encode", held)
    monkeypatch.setattr(tower, "_on_finished", ended.set)
    house.turnstile.release()
    picture = 2 + stream  # one that nobody has seen
    connection = send(house.address, chat(picture, stream=stream))
    assert begun.wait(PATIENCE_S)
    house.leave(connection)
    house.assert_empty()
    may_end.set()
    assert ended.wait(PATIENCE_S)
    assert [plan.rows for plan in house.turnstile.plans if plan.rows] == []
    other = send(house.address, chat(picture, max_tokens=1))  # who asks for the same picture next is answered
    assert other.recv(4096).startswith(b"HTTP/1.1 200")
    other.close()
    house.assert_empty()
