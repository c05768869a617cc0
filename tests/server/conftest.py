"""One tiny LLaVA behind an application, and a real server on a port of its own."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from opsin import AsyncLLM
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.listening import listen, url_of
from opsin.server.run import uvicorn_config
from tests.engine.conftest import picture

if TYPE_CHECKING:
    from tests.factory import LlavaShape

NAME = "tiny"


@pytest.fixture(scope="session")
def engine(tiny_llava: Callable[[LlavaShape], Path]) -> Iterator[AsyncLLM]:
    from tests.factory import LlavaShape

    with AsyncLLM(str(tiny_llava(LlavaShape(num_kv_heads=2))), media_workers=1) as engine:
        yield engine


@contextmanager
def serving(app: FastAPI, config: ServerConfig | None = None) -> Iterator[str]:
    """Run an application, on an ephemeral port of loopback unless ``config`` says otherwise; yields its address."""
    config = config or ServerConfig(port=0)
    listener = listen(config)
    server = uvicorn.Server(uvicorn_config(app, config))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield url_of(listener, config)
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="session")
def app(engine: AsyncLLM) -> FastAPI:
    return create_app(engine, ServerConfig(served_model_name=(NAME, "alias")), model="root")


@pytest.fixture(scope="session")
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as address:
        yield address


@pytest.fixture
def client(address: str, app: FastAPI, engine: AsyncLLM) -> Iterator[httpx.Client]:
    """An HTTP client of the running server; whatever a test did, nothing may be left behind."""
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        yield client
    assert_idle(app, engine)


def assert_idle(app: FastAPI, engine: AsyncLLM) -> None:
    """Every place, block and byte comes back; what has not in twenty seconds never will, however slow the machine."""
    deadline = time.monotonic() + 20
    names = ("num_requests_running", "num_requests_waiting", "kv_blocks_used", "feature_bytes_leased")
    while True:
        left = {name: engine.stats()[name] for name in names} | {"admitted": app.state.server.admission.num_admitted}
        if not any(left.values()):
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def data_url(seed: int, form: str = "PNG", **size: int) -> str:
    buffer = io.BytesIO()
    picture(seed, **size).save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def user(*parts: Any) -> list[dict[str, Any]]:
    """One user message of texts and, for every number, a picture."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        if isinstance(part, int)
        else part
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    """The body of a greedy chat request of exactly eight tokens, unless ``fields`` say otherwise."""
    greedy = {"model": NAME, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    return {**greedy, "messages": user(*(parts or ("What is this?",))), **fields}


def run_async(work: Any) -> Any:
    return asyncio.run(work)
