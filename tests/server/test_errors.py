"""Every row of the error table, on the wire and in the documentation."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from opsin import AsyncLLM
from opsin.errors import ContextLengthError, EngineDeadError, MediaError, RequestError, RequestFailedError
from opsin.server import errors
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.errors import TABLE, describe
from tests.server.conftest import NAME, chat, serving

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
MADE: dict[type[Exception], Exception] = {
    RequestError: RequestError("no", param="p", code="c"),
    EngineDeadError: EngineDeadError("The step failed: CUDA error at /srv/opsin/kernel.cu:17"),
    RequestFailedError: RequestFailedError("logits are not finite"),
    Exception: KeyError("/srv/secret/path"),
}


def made(kind: type[Exception]) -> Exception:
    return MADE[kind] if kind in MADE else kind("no")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.error.__name__)
def test_error_becomes_its_row(row: errors.Row):
    status, body, _ = describe(made(row.error), "req-1")
    assert status == row.status
    assert body.error.type == row.type
    assert body.error.code == (row.code or "c")
    assert "/srv" not in body.error.message
    if row.error is Exception:
        assert "req-1" in body.error.message


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.error.__name__)
def test_row_is_in_the_documentation(row: errors.Row):
    lines = re.findall(r"^\| (\d{3}) \| `([a-z_]+)` \| ([^|]+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    code = f"`{row.code}`" if row.code else "the error's own"
    assert (str(row.status), row.type, code) in {(status, kind, text.strip()) for status, kind, text in lines}
    assert len(lines) == len({(r.status, r.type, r.code) for r in TABLE})


def test_subclasses_share_their_parents_row():
    for error in (MediaError("no", code="image_parse_error"), ContextLengthError("long")):
        status, body, _ = describe(error, "x")
        assert (status, body.error.code) == (400, error.code)


def test_addresses_do_not_leave():
    _, body, _ = describe(RequestError("cannot identify <_io.BytesIO object at 0x7f3b9c1d2e30>"), "x")
    assert "7f3b9c" not in body.error.message


ENDLESS: dict[str, Any] = {"stream": True, "max_tokens": 400}  # more tokens than could come in a few pieces


class Failing:
    """An engine whose streams fail after some outputs, of which there must be more; otherwise the real one."""

    def __init__(self, engine: AsyncLLM, error: Exception, after: int) -> None:
        self._engine = engine
        self._error = error
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def stream(self, processed: Any, output_kind: Any = "cumulative") -> AsyncGenerator[Any, None]:
        given = 0
        stream = self._engine.stream(processed, output_kind)
        try:
            async for output in stream:
                if given >= self._after:
                    raise self._error
                given += 1
                yield output
            raise AssertionError(f"The stream ended after {given} outputs, and was to fail after {self._after}.")
        finally:
            await stream.aclose()


@pytest.mark.parametrize("row", [r for r in TABLE if r.status >= 500], ids=lambda row: row.error.__name__)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_failure_before_the_first_token_has_its_status(engine: AsyncLLM, row: errors.Row, stream: bool):
    app = create_app(Failing(engine, made(row.error), 0), ServerConfig(), model=NAME)  # type: ignore[arg-type]
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        response = client.post("/v1/chat/completions", json=chat(stream=stream))
        assert response.status_code == row.status
        assert response.json()["error"]["code"] == row.code
        assert "/srv" not in response.text
        assert client.get("/health").status_code == 200
    assert app.state.server.admission.num_admitted == 0


def test_failure_within_a_stream_is_its_last_event(engine: AsyncLLM):
    error = RequestFailedError("logits are not finite")
    app = create_app(Failing(engine, error, 3), ServerConfig(), model=NAME)  # type: ignore[arg-type]
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        text = client.post("/v1/chat/completions", json=chat(**ENDLESS)).text
    lines = [line for line in text.split("\n") if line]
    assert '"code":"request_failed"' in lines[-1]
    assert lines[-1].startswith("data: ")
    assert not any("[DONE]" in line for line in lines)
    assert len(lines) == 1 + 3 + 1
    assert app.state.server.admission.num_admitted == 0


def test_unforeseen_failure_within_a_stream_is_logged_and_counted(engine: AsyncLLM, caplog: pytest.LogCaptureFixture):
    app = create_app(Failing(engine, ZeroDivisionError("/srv"), 3), ServerConfig(), model=NAME)  # type: ignore[arg-type]
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        headers = {"X-Request-Id": "find-me-there"}
        text = client.post("/v1/chat/completions", json=chat(**ENDLESS), headers=headers).text
        metrics = client.get("/metrics").text
    assert '"code":"internal_error"' in text
    assert "/srv" not in text
    assert "find-me-there" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert 'status="500",code="internal_error"} 1' in metrics


def test_failed_vector_is_counted_as_an_error(engine: AsyncLLM):
    app = create_app(Failing(engine, RequestFailedError("lost"), 0), ServerConfig(), model=NAME)  # type: ignore[arg-type]
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 500
        assert 'finished_reason="error"} 1' in client.get("/metrics").text


def test_client_that_leaves_within_its_body_is_no_failure(
    client: httpx.Client, address: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="opsin")
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.1)
    deadline = time.monotonic() + 5
    while "POST /tokenize" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "failed" not in caplog.text


def test_what_was_sent_comes_back_shortened():
    error = RequestError("role is " + "w" * 10**7 + "; it must be user.", param="messages." + "x" * 10**6)
    _, body, _ = describe(error, "id")
    assert body.error.message.startswith("role is www")
    assert body.error.message.endswith("; it must be user.")
    assert len(body.error.message) < 1100
    assert len(body.error.param or "") < 300
