"""A device that fails in a step: everybody is told, its process ends, and another one answers as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from opsin import AsyncLLM
from opsin.cli.main import main
from opsin.engine import child
from opsin.engine.remote import RemoteEngine
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.server import failing_process
from tests.server.conftest import NAME, assert_idle, chat, serving
from tests.server.test_engine_process import is_gone, statuses, wait_for

if TYPE_CHECKING:
    from tests.factory import LlavaShape

CHAT = "/v1/chat/completions"


def answer(client: httpx.Client) -> Any:
    return client.post(CHAT, json=chat(1, "What is it?")).json()["choices"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt_length", "reason"),
    [
        (failing_process.OUT_OF_MEMORY, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (failing_process.STICKY, "CUDA error: an illegal memory access was encountered"),
    ],
    ids=["out-of-memory", "sticky"],
)
def test_device_that_fails_is_never_used_again_by_the_process_that_had_it(
    tiny_llava: Callable[[LlavaShape], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    prompt_length: int,
    reason: str,
):
    from tests.factory import LlavaShape

    monkeypatch.setattr(child, "BOOTSTRAP", failing_process.BOOTSTRAP)
    with AsyncLLM.spawn(str(tiny_llava(LlavaShape(num_kv_heads=2))), media_workers=1) as llm:
        engine = llm._front.engine
        assert isinstance(engine, RemoteEngine)
        app = create_app(llm, ServerConfig(), model=NAME)
        with serving(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            before, first = answer(client), engine.pid
            with client.stream("POST", CHAT, json=chat(stream=True, n=16, max_tokens=480)) as running:
                events = running.iter_lines()
                next(events)
                refused = client.post("/v1/completions", json={"prompt": [5] * prompt_length, "max_tokens": 2})
                assert '"code":"engine_restarting"' in [line for line in events if line][-1]
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_restarting"
            assert int(refused.headers["retry-after"]) >= 1
            assert "CUDA" not in refused.text
            wait_for(lambda: statuses(client) == [200, 503, 503])  # what comes next imports torch: it takes its time
            wait_for(lambda: statuses(client) == [200, 200, 200])
            assert is_gone(first)
            assert engine.pid != first
            assert answer(client) == before
            assert_idle(app, llm)
    log = capfd.readouterr().err
    assert "The engine failed in a step and has stopped." in log
    assert reason in log


def test_engine_over_several_devices_is_refused_in_one_line(capfd: pytest.CaptureFixture[str]):
    assert main(["serve", "demo", "--port", "0", "--tensor-parallel-size", "2"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("opsin: error: tensor_parallel_size is 2; only 1 is implemented")
    assert error.count("\n") == 1
