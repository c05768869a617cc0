"""More clients than can be served at once: who waits is answered in turn, the rest is refused and costs no work."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest
from fastapi import FastAPI

from opsin import AsyncLLM
from opsin.engine import core
from opsin.engine.local import LocalEngine
from opsin.runner.executor import PendingStep
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.types import StepPlan
from tests.server.conftest import NAME, assert_idle, chat, serving
from tests.server.test_life import send, wait_for

if TYPE_CHECKING:
    from tests.factory import LlavaShape

URL = "/v1/chat/completions"
RUNNING, WAITING = 4, 4  # answers
CAPACITY = RUNNING + WAITING
NUM_ANSWERS = 48


class Counted:
    """Counts the tokens that an engine's steps compute, and can hold the steps up."""

    def __init__(self, engine: LocalEngine) -> None:
        executor = engine.core.executor
        self._launch = executor.launch
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.num_tokens = 0
        executor.launch = self._count  # type: ignore[method-assign]

    def _count(self, plan: StepPlan) -> PendingStep:
        assert self.may_go_on.wait(30)
        self.num_tokens += plan.num_tokens
        return self._launch(plan)


class House(NamedTuple):
    """A server of few places."""

    address: str
    app: FastAPI
    llm: AsyncLLM
    steps: Counted


@pytest.fixture(scope="module")
def house(tiny_llava: Callable[[LlavaShape], Path]) -> Iterator[House]:
    from tests.factory import LlavaShape

    folder = tiny_llava(LlavaShape(num_kv_heads=2))
    with AsyncLLM(str(folder), media_workers=0, max_num_seqs=RUNNING, enable_prefix_caching=False) as llm:
        engine = llm._front.engine
        assert isinstance(engine, LocalEngine)
        app = create_app(llm, ServerConfig(max_queue=WAITING), model=NAME)
        with serving(app) as address:
            yield House(address, app, llm, Counted(engine))


def crowd(house: House, num_clients: int) -> tuple[Counter[int], int]:
    """Let clients ask until all their questions are answered, again at once where they are refused.

    Returns:
        How often each status came, and the tokens that the engine computed for it all.
    """
    before = house.steps.num_tokens
    all_there = threading.Barrier(num_clients)

    def ask(number: int) -> Counter[int]:
        seen: Counter[int] = Counter()
        with httpx.Client(base_url=house.address, timeout=60, trust_env=False) as client:
            all_there.wait(30)
            while seen[200] < NUM_ANSWERS // num_clients:
                response = client.post(URL, json=chat("word " * 20, seed=number))
                seen[response.status_code] += 1
                if response.status_code == 200:
                    assert response.json()["usage"]["completion_tokens"] == 8
                else:
                    assert response.json()["error"]["code"] == "server_is_overloaded"
                    assert 1 <= int(response.headers["retry-after"]) <= 120
        return seen

    with ThreadPoolExecutor(num_clients) as threads:
        seen = sum(threads.map(ask, range(num_clients)), Counter[int]())
    assert_idle(house.app, house.llm)
    return seen, house.steps.num_tokens - before


def test_twice_the_load_is_refused_and_costs_those_who_are_served_nothing(house: House):
    served, tokens = crowd(house, CAPACITY)
    assert served == {200: NUM_ANSWERS}
    house.steps.may_go_on.clear()  # until the places are taken, and the next one is refused
    taken = [send(house.address, chat("word " * 20)) for _ in range(CAPACITY)]
    wait_for(lambda: house.app.state.server.admission.num_admitted == CAPACITY)
    with httpx.Client(base_url=house.address, timeout=60, trust_env=False) as client:
        assert client.post(URL, json=chat("word " * 20)).status_code == 503
        assert client.get("/health").status_code == 200
    house.steps.may_go_on.set()
    for connection in taken:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.close()
    assert_idle(house.app, house.llm)
    crowded, crowded_tokens = crowd(house, 2 * CAPACITY)
    assert set(crowded) <= {200, 503}
    assert crowded[200] == NUM_ANSWERS
    assert crowded_tokens == tokens  # what is refused never reaches the engine, and nothing is begun twice


def test_answer_that_waits_for_hours_is_given_when_its_turn_comes(house: House, monkeypatch: pytest.MonkeyPatch):
    long: dict[str, Any] = {"max_tokens": 300, "n": RUNNING, "stream": True}
    house.steps.may_go_on.clear()
    running = send(house.address, chat(**long))
    waiting = send(house.address, chat("word " * 20))
    wait_for(lambda: house.app.state.server.admission.num_admitted == RUNNING + 1)
    hours_later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3 * 3600)
    monkeypatch.setattr(core, "time", hours_later)  # the clock that tells the scheduler the time
    house.steps.may_go_on.set()
    assert running.recv(4096).startswith(b"HTTP/1.1 200")
    waiting.settimeout(60)
    assert waiting.recv(4096).startswith(b"HTTP/1.1 200")
    for connection in (running, waiting):
        connection.close()
    assert_idle(house.app, house.llm)
