"""What operators set: CORS, TLS, a path of a proxy's, logs, templates' values, usage."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from opsin import AsyncLLM
from opsin.cli import serve
from opsin.errors import ConfigError
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.server.conftest import NAME, chat, serving

PEM = str(Path(__file__).with_name("localhost.pem"))  # a key, and a certificate of 127.0.0.1 by itself
BASE = ServerConfig(port=0, served_model_name=(NAME,))


@contextmanager
def served(engine: AsyncLLM, verify: ssl.SSLContext | bool = True, **settings: Any) -> Iterator[httpx.Client]:
    config = replace(BASE, **settings)
    with serving(create_app(engine, config, model="root"), config) as address:
        with httpx.Client(base_url=address, timeout=60, trust_env=False, verify=verify) as client:
            yield client


def test_pages_of_an_allowed_origin_may_ask_and_read_refusals(engine: AsyncLLM) -> None:
    page = {"Origin": "https://app.example"}
    with served(engine, allowed_origins=("https://app.example",), api_key=("k",)) as client:
        asked = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        before = client.options("/v1/chat/completions", headers=asked)
        refused = client.post("/v1/chat/completions", headers=page, json=chat())
        answer = client.post("/v1/chat/completions", headers={**page, "Authorization": "Bearer k"}, json=chat())
        foreign = client.options("/v1/chat/completions", headers={**asked, "Origin": "https://evil.example"})
    assert before.status_code == 200
    assert before.headers["access-control-allow-headers"] == "authorization"
    for response, status in ((before, 200), (refused, 401), (answer, 200)):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    assert foreign.status_code == 400
    assert "access-control-allow-origin" not in foreign.headers


def test_pages_of_other_origins_get_no_leave_by_default(client: httpx.Client) -> None:
    answer = client.get("/v1/models", headers={"Origin": "https://app.example"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_every_origin_may_be_allowed_with_some_methods_and_headers(engine: AsyncLLM) -> None:
    settings: dict[str, Any] = {"allowed_origins": ("*",), "allowed_methods": ("GET",), "allowed_headers": ("X-One",)}
    with served(engine, **settings) as client:
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert client.options("/v1/models", headers=asked).status_code == 400
        asked["Access-Control-Request-Method"] = "GET"
        allowed = client.options("/v1/models", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "*"
    assert "X-One" in allowed.headers["access-control-allow-headers"]


def test_server_with_a_certificate_talks_tls(engine: AsyncLLM) -> None:
    with served(engine, ssl.create_default_context(cafile=PEM), ssl_certfile=PEM) as client:
        assert client.base_url.scheme == "https"
        assert client.get("/health").status_code == 200
        answer = client.post("/v1/chat/completions", json=chat(stream=True))
        assert answer.text.endswith("data: [DONE]\n\n")


def test_client_without_the_demanded_certificate_is_refused(engine: AsyncLLM) -> None:
    settings = {"ssl_certfile": PEM, "ssl_keyfile": PEM, "ssl_ca_certs": PEM, "ssl_cert_reqs": 2}
    known = ssl.create_default_context(cafile=PEM)
    known.load_cert_chain(PEM)
    with served(engine, known, **settings) as client:
        assert client.get("/health").status_code == 200
        with httpx.Client(verify=ssl.create_default_context(cafile=PEM), trust_env=False) as stranger:
            with pytest.raises(httpx.TransportError):
                stranger.get(f"{client.base_url}/health")


def test_wrong_certificate_costs_one_line_and_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from opsin.cli.main import main

    (tmp_path / "x.pem").write_text("no certificate")
    for file in (tmp_path / "none.pem", tmp_path / "x.pem"):
        assert main(["serve", "/no/such/model", "--port", "0", "--ssl-certfile", str(file)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"TLS cannot be had with {file}" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ssl_keyfile": "k"}, "ssl_keyfile needs ssl_certfile"),
        ({"ssl_cert_reqs": 3}, "ssl_cert_reqs is 3"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 1}, "ssl_cert_reqs needs ssl_ca_certs"),
        ({"root_path": "vlm"}, "root_path is 'vlm'"),
        ({"allowed_origins": ("*",), "allow_credentials": True}, "allow_credentials needs allowed_origins"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**settings)


def test_line_to_try_names_the_certificate_and_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    line = serve.curl_line("https://127.0.0.1:1/vlm", replace(BASE, ssl_certfile="my cert.pem"), NAME)
    assert "https://127.0.0.1:1/vlm/v1/chat/completions" in line
    assert "--cacert 'my cert.pem'" in line


@pytest.mark.parametrize("prefix", ["/vlm", "/vlm/"])
def test_server_under_a_path_answers_with_and_without_it(engine: AsyncLLM, prefix: str) -> None:
    with served(engine, root_path=prefix, api_key=("k",)) as client:
        path, key = prefix.rstrip("/"), {"Authorization": "Bearer k"}
        for start in (path, ""):
            assert client.get(f"{start}/v1/models", headers=key).status_code == 200
            assert client.get(f"{start}/v1/models").status_code == 401
            assert client.get(f"{start}/health").status_code == 200
        assert client.get(f"{path}lone/v1/models", headers=key).status_code == 404
        page = client.get(path)  # as the banner has it
        assert (page.status_code, page.headers["location"]) == (307, "/vlm/")
        assert client.get(page.headers["location"]).text.startswith("<!doctype html>")
        assert client.get(f"{path}/openapi.json", headers=key).json()["servers"] == [{"url": prefix}]


def test_documentation_may_be_left_out(engine: AsyncLLM) -> None:
    with served(engine, disable_fastapi_docs=True) as client:
        assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/v1/models")] == [404, 404, 200]


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        ({}, ["/v1/models", "/metrics"]),
        ({"disable_access_log_for_endpoints": "/metrics, /load"}, ["/v1/models"]),
        ({"disable_uvicorn_access_log": True}, []),
    ],
    ids=["all", "some", "none"],
)
def test_requests_are_logged_but_for_paths_that_are_left_out(
    engine: AsyncLLM, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], logged: list[str]
) -> None:
    caplog.set_level(logging.INFO, "opsin.server.gate")
    with served(engine, **settings) as client:
        for path in ("/v1/models", "/metrics", "/load", "/health"):
            client.get(path)
    lines = [record.getMessage().split()[1] for record in caplog.records if record.name == "opsin.server.gate"]
    assert [path for path in lines if path != "/load"] == logged
    assert ("/load" in lines) == (len(logged) == 2)


def test_levels_of_uvicorns_log_are_taken(engine: AsyncLLM) -> None:
    with served(engine, uvicorn_log_level="error"):
        assert logging.getLogger("uvicorn.error").level == logging.ERROR
    with served(engine):
        assert logging.getLogger("uvicorn.error").level == logging.WARNING
