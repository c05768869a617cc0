"""A server whose model is not there yet: it answers probes, tells others when to come again, and can be told to end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from opsin import AsyncLLM
from opsin.errors import EngineDeadError, UnsupportedModelError
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.listening import listen, url_of
from opsin.server.run import run
from tests.server.conftest import NAME, chat
from tests.server.test_engine_process import children, is_gone, wait_for
from tests.server.test_transport import error_of

CHAT = "/v1/chat/completions"


class Lent:
    """The real engine, under a server that is to end before it."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self.is_running = True
        self.was_shut_down = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def require_running(self) -> None:
        raise EngineDeadError("It was enough.")

    def shutdown(self) -> None:
        self.was_shut_down = True


def running(load: Callable[[threading.Event], FastAPI], announced: threading.Event) -> tuple[str, Future[None]]:
    """A server on a thread: its address, and how it ended."""
    listener = listen(ServerConfig(port=0))
    end: Future[None] = Future()

    def work() -> None:
        try:
            end.set_result(run(listener, load, lambda _: announced.set(), ServerConfig(port=0)))
        except BaseException as error:
            end.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return url_of(listener, ServerConfig()), end


def test_server_whose_model_loads_answers_probes_and_then_everything(engine: AsyncLLM):
    lent, may_load, announced = Lent(engine), threading.Event(), threading.Event()

    def load(_: threading.Event) -> FastAPI:
        assert may_load.wait(60)
        return create_app(lent, ServerConfig(api_key=("secret",)), model=NAME)  # type: ignore[arg-type]

    address, end = running(load, announced)
    with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        assert client.get("/live").status_code == 200
        for path in ("/ready", "/health"):
            response = client.get(path)
            assert (response.status_code, response.text) == (503, "The model is being loaded.")
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/no/such/route")):
            response = client.request(method, path, headers={"X-Request-Id": "mine"})
            assert response.status_code == 503
            assert error_of(response)["code"] == "model_loading"
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["x-request-id"] == "mine"
        assert not announced.is_set()
        may_load.set()
        assert announced.wait(30)
        assert [client.get(path).status_code for path in ("/live", "/ready", "/health")] == [200, 200, 200]
        assert client.post(CHAT, json=chat()).status_code == 401
        assert client.post(CHAT, json=chat(), headers={"Authorization": "Bearer secret"}).status_code == 200
        lent.is_running = False
        assert isinstance(end.exception(30), EngineDeadError)
    assert lent.was_shut_down


def test_server_whose_model_cannot_be_loaded_says_why_and_ends():
    may_fail = threading.Event()

    def load(_: threading.Event) -> FastAPI:
        assert may_fail.wait(60)
        raise UnsupportedModelError("no such architecture")

    address, end = running(load, threading.Event())
    with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        assert client.get("/ready").status_code == 503
        may_fail.set()
        assert isinstance(end.exception(30), UnsupportedModelError)
        with pytest.raises(httpx.TransportError):
            client.get("/live")


def test_server_told_to_end_while_it_loads_ends_at_once_and_leaves_no_process(tmp_path: Path):
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "opsin", "serve", "demo", "--uds", str(path)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(path.exists)
        with httpx.Client(base_url="http://x", transport=httpx.HTTPTransport(uds=str(path)), timeout=30) as client:
            assert [client.get(path).status_code for path in ("/live", "/ready")] == [200, 503]
        wait_for(lambda: len(children(server.pid)) > 0)
        left = children(server.pid)
        server.send_signal(signal.SIGTERM)
        begun_s = time.monotonic()
        assert server.wait(30) == 0
        assert time.monotonic() - begun_s < 20
        wait_for(lambda: all(map(is_gone, left)))
        assert server.stderr is not None
        assert "Stopped.\n" in server.stderr.read()
        assert not path.exists()
    finally:
        server.kill()
        server.communicate()
