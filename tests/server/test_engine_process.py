"""``opsin serve`` with its engine in a process of its own: killed, stopped, orphaned, told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import chat
from tests.server.test_serve import process

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"model": "demo", "n": 8, "max_tokens": 1000}


@contextmanager
def serving(*flags: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    with process("demo", "--port", "0", *flags) as (server, lines):
        address = next(line.split(" at ")[1].strip() for line in lines if line.startswith("Serving"))
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            yield server, client


def children(pid: int) -> list[int]:
    """Processes that a process started, theirs included."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def engine_of(server: subprocess.Popen[str]) -> int:
    for task in Path(f"/proc/{server.pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            return child
    raise AssertionError("there is no engine process")


def is_gone(pid: int) -> bool:
    """It has ended; nobody may have asked for its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> float:
    """Wait, and tell how long it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.01)
    return time.monotonic() - begun


def statuses(client: httpx.Client) -> list[int]:
    return [client.get(path).status_code for path in ("/live", "/ready", "/health")]


def answer(client: httpx.Client) -> Any:
    return client.post(CHAT, json=chat(1, "What is it?", model="demo", max_tokens=16)).json()["choices"]


def end_engine(
    server: subprocess.Popen[str], client: httpx.Client, how: signal.Signals
) -> tuple[str, httpx.Response, float]:
    """Signal the engine in the middle of a stream and of an answer that is not streamed.

    Returns:
        The stream's last event, the other answer, and the seconds until ``/ready`` said no.
    """
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.post, CHAT, json=chat(**LONG))
        with client.stream("POST", CHAT, json=chat(stream=True, **LONG)) as running:
            events = running.iter_lines()
            for _ in range(40):
                next(events)
            os.kill(engine_of(server), how)
            unready_s = wait_for(lambda: statuses(client) == [200, 503, 503], 5)
            last = [line for line in events if line][-1]
        return last, waiting.result(20), unready_s


@pytest.mark.slow
def test_server_outlives_two_ends_of_its_engine_and_not_the_third():
    with serving("--engine-silence-s", "1") as (server, client):
        before = answer(client)
        for how in (signal.SIGKILL, signal.SIGSTOP):
            last, refused, unready_s = end_engine(server, client, how)
            assert '"code":"engine_restarting"' in last
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_restarting"
            assert int(refused.headers["retry-after"]) >= 1
            assert unready_s < 1
            assert client.post(CHAT, json=chat(model="demo")).json()["error"]["code"] == "engine_restarting"
            wait_for(lambda: statuses(client) == [200, 200, 200])
            assert answer(client) == before
        os.kill(engine_of(server), signal.SIGKILL)
        assert server.wait(20) == 2
        assert server.stderr is not None
        log = server.stderr.read()
    assert "most recent call first" in log  # where the stopped one stood
    assert "opsin: error: The engine process ended 3 times" in log


def test_no_process_outlives_a_server_that_was_killed():
    with serving() as (server, client):
        answer(client)
        left = children(server.pid)
        assert len(left) >= 2  # the engine, and a worker that decoded the picture
        with client.stream("POST", CHAT, json=chat(stream=True, **LONG)) as running:
            next(running.iter_lines())
            server.kill()
            server.wait()
            wait_for(lambda: all(map(is_gone, left)), 5)


def test_engine_waits_for_its_server_when_everybody_is_told_to_end():
    with serving() as (server, client):
        with client.stream("POST", CHAT, json=chat(stream=True, model="demo", max_tokens=200)) as running:
            events = running.iter_lines()
            next(events)
            for pid in (engine_of(server), server.pid):  # as systemd does
                os.kill(pid, signal.SIGTERM)
            rest = [line for line in events if line]
        left = children(server.pid)
        assert rest[-1] == "data: [DONE]"
        assert server.wait(20) == 0
        assert all(map(is_gone, left))


def test_model_that_engine_cannot_load_ends_the_server_with_one_line(capfd: pytest.CaptureFixture[str]):
    from opsin.cli.main import main

    assert main(["serve", "demo", "--port", "0", "--device", "cuda:9"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("opsin: error: device is 'cuda:9'")
    assert error.count("\n") == 1
