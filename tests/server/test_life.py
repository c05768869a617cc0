"""Clients that leave, a server that is full, an engine that has stopped: nothing is leaked and everybody is told."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

from opsin import AsyncLLM
from opsin.server.admission import Admission
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.errors import OverloadedError
from tests.server.conftest import NAME, assert_idle, chat, serving
from tests.server.test_errors import Failing

if TYPE_CHECKING:
    from tests.factory import LlavaShape

URL = "/v1/chat/completions"
LONG: dict[str, Any] = {"max_tokens": 480, "n": 16, "temperature": 1}


def sample(client: httpx.Client, name: str, labels: str = "") -> float:
    """One sample of /metrics."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith((f"vllm:{name}{{", f"opsin:{name}{{")) and labels in line:
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no sample {name} {labels}")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def send(address: str, body: dict[str, Any]) -> socket.socket:
    """Post a body over a socket of our own."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    data = json.dumps(body).encode()
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_client_that_leaves_while_its_answer_grows_is_aborted(
    client: httpx.Client, address: str, engine: AsyncLLM, app: FastAPI, stream: bool
):
    aborted = sample(client, "request_success_total", 'finished_reason="abort"')
    before = sample(client, "generation_tokens_total")
    connection = send(address, chat(1, "Tell me.", stream=stream, **LONG))
    if stream:
        received = b""
        while received.count(b"data: ") < 40:
            received += connection.recv(4096)
    else:
        wait_for(lambda: engine.stats()["num_requests_running"] >= 16)
    connection.close()
    assert_idle(app, engine)
    assert sample(client, "request_success_total", 'finished_reason="abort"') == aborted + 1
    assert sample(client, "generation_tokens_total") - before < 16 * 480 / 2


def test_client_that_leaves_while_it_waits_is_forgotten(
    client: httpx.Client, address: str, engine: AsyncLLM, app: FastAPI
):
    running = [send(address, chat(stream=True, **LONG)) for _ in range(2)]  # they fill the engine
    wait_for(lambda: engine.stats()["num_requests_running"] == 32)
    waiting = send(address, chat(1, **LONG))
    wait_for(lambda: engine.stats()["num_requests_waiting"] == 16)
    waiting.close()
    wait_for(lambda: engine.stats()["num_requests_waiting"] == 0)
    for connection in running:
        connection.close()
    assert_idle(app, engine)


def test_client_that_leaves_in_the_middle_of_its_body_is_forgotten(
    client: httpx.Client, address: str, engine: AsyncLLM, app: FastAPI
):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
    assert client.get("/health").status_code == 200
    assert_idle(app, engine)


def test_many_clients_that_leave_at_any_time_leak_nothing(
    client: httpx.Client, address: str, engine: AsyncLLM, app: FastAPI
):
    solo = client.post(URL, json=chat(1, "Canary", max_tokens=48)).json()["choices"]
    connections = [send(address, chat(i, stream=i % 2 == 0, **LONG)) for i in range(12)]
    for i, connection in enumerate(connections):
        time.sleep(0.003 * i)
        connection.close()
    assert client.post(URL, json=chat(1, "Canary", max_tokens=48)).json()["choices"] == solo
    assert_idle(app, engine)


class Narrow:
    """An engine that says it runs one request at a time; otherwise the real one."""

    max_num_seqs = 1

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_full_server_says_when_to_come_again(engine: AsyncLLM):
    app = create_app(Narrow(engine), ServerConfig(max_queue=0), model=NAME)  # type: ignore[arg-type]
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        with client.stream("POST", URL, json=chat(stream=True, max_tokens=400)) as first:
            lines = first.iter_lines()
            next(lines)
            refused = client.post(URL, json=chat())
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "server_is_overloaded"
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 503
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert client.post(URL, json=chat()).status_code == 200
        assert 'status="503"' in client.get("/metrics").text


def test_draining_server_finishes_what_runs_and_takes_no_more(engine: AsyncLLM):
    app = create_app(engine, ServerConfig(), model=NAME)
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        with client.stream("POST", URL, json=chat(stream=True, max_tokens=200)) as first:
            lines = first.iter_lines()
            next(lines)
            app.state.server.admission.drain()
            assert client.get("/ready").status_code == 503
            assert client.get("/live").status_code == client.get("/health").status_code == 200
            refused = client.post(URL, json=chat())
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_stopped_engine_is_told_to_everybody(tiny_llava: Callable[[LlavaShape], Path]):
    from tests.factory import LlavaShape

    engine = AsyncLLM(str(tiny_llava(LlavaShape(num_kv_heads=2))), media_workers=1)
    app = create_app(engine, ServerConfig(), model=NAME)
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        with client.stream("POST", URL, json=chat(stream=True, **LONG)) as running:
            lines = running.iter_lines()
            next(lines)
            engine.shutdown()
            last = [line for line in lines if line][-1]
        assert '"code":"engine_stopped"' in last
        assert [client.get(path).status_code for path in ("/live", "/health", "/ready")] == [200, 503, 503]
        for path, body in ((URL, chat(1)), ("/v1/completions", {"prompt": "a"}), ("/v1/embeddings", {"input": "a"})):
            response = client.post(path, json=body)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_stopped"
    assert app.state.server.admission.num_admitted == 0


def test_admission_tells_the_wait_by_the_rate_of_the_last_minute():
    now = [100.0]
    admission = Admission(10, clock=lambda: now[0])
    assert admission.retry_after_s() == 1
    for _ in range(5):  # one every two seconds
        with admission.enter(1):
            now[0] += 2
    now[0] += 2
    with admission.enter(10):
        assert admission.retry_after_s() == 20
        with pytest.raises(OverloadedError) as refusal, admission.enter(1):
            pass
        assert refusal.value.headers == {"Retry-After": "20"}
        now[0] += 1000
        assert admission.retry_after_s() == 1
    assert admission.num_admitted == 0


def test_admission_lets_in_a_request_larger_than_the_queue_when_it_is_alone():
    admission = Admission(2)
    with admission.enter(16):
        assert admission.num_admitted == 16
        with pytest.raises(OverloadedError), admission.enter(1):
            pass


def test_metrics_agree_with_what_was_sent(client: httpx.Client):
    def counts() -> dict[str, float]:
        names = ("prompt_tokens_total", "generation_tokens_total", "pictures_total")
        told = {name: sample(client, name) for name in names}
        told["length"] = sample(client, "request_success_total", 'finished_reason="length"')
        told["latencies"] = sample(client, "e2e_request_latency_seconds_count")
        return told

    before = counts()
    usage = client.post(URL, json=chat(1, 2, "What?", n=2)).json()["usage"]
    after = counts()
    assert {name: after[name] - before[name] for name in after} == {
        "prompt_tokens_total": usage["prompt_tokens"],
        "generation_tokens_total": 16,
        "pictures_total": 2,
        "length": 1,
        "latencies": 1,
    }
    assert sample(client, "num_requests_running") == sample(client, "num_requests_waiting") == 0


def test_metrics_are_in_prometheus_format(client: httpx.Client):
    text = client.get("/metrics").text
    sample = r'(vllm|opsin):\w+\{model_name="tiny",engine="0"[^}]*\} [-+.e\d]+'
    line = re.compile(rf"(# (HELP|TYPE) (vllm|opsin):\w+ .+|{sample})")
    assert [bad for bad in text.splitlines() if not line.fullmatch(bad)] == []
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(names) == len(set(names))
    for name in (
        "num_requests_running",
        "kv_cache_usage_perc",
        "time_to_first_token_seconds",
        "prefix_cache_hits_total",
    ):
        assert f"vllm:{name}" in names
    buckets = [float(v) for v in re.findall(r"e2e_request_latency_seconds_bucket\{.*\} (\S+)", text)]
    assert buckets == sorted(buckets)


def test_unforeseen_failure_is_logged_and_tells_nothing(engine: AsyncLLM, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    failing = Failing(engine, ZeroDivisionError("/srv/secret 0x7f00deadbeef"), 0)
    app = create_app(failing, ServerConfig(), model=NAME)  # type: ignore[arg-type]
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        response = client.post(URL, json=chat(), headers={"X-Request-Id": "find-me"})
    assert response.status_code == 500
    assert "find-me" in response.json()["error"]["message"]
    assert "secret" not in response.text
    assert "ZeroDivisionError" in caplog.text
    assert "in _run" in caplog.text  # where it failed
    assert "find-me" in caplog.text
    assert "secret" not in caplog.text  # an error's text may quote the request
