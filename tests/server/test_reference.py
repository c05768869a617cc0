"""``/docs``: all routes and fields, and nothing from elsewhere."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from opsin import AsyncLLM
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.gate import OPEN, PROBES
from opsin.server.reference import reference_page
from tests.server.conftest import NAME
from tests.server.test_options import served


def test_page_lists_every_route_and_field(client: httpx.Client):
    page, document = client.get("/docs").text, client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<b>{method.upper()}</b> <code>{path}</code>" in page
    for name in document["components"]["schemas"]["ChatCompletionRequest"]["properties"]:
        assert f"<td>{name}<" in page
    assert "<td>messages<td>list of" in page
    assert "required<td>the conversation; content is text or a list of text and picture parts." in page


def test_page_loads_nothing(client: httpx.Client):
    answer = client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "<script" not in answer.text
    assert re.findall(r'(?:src|href)="([^"]*)"', answer.text) == ["openapi.json"]


def test_document_tells_answers_and_errors_of_every_route(client: httpx.Client):
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path in ("/v1/embeddings", "/pooling"):
        assert "application/octet-stream" in document["paths"][path]["post"]["responses"]["200"]["content"]
    assert "HTTPValidationError" not in schemas  # FastAPI's own, which is never sent
    nothing = {"/classify", *(path for path in document["paths"] if path.startswith("/v1/responses/"))}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            responses = operation["responses"]
            assert ("200" in responses) != (path in nothing), path
            for response in responses.values():
                for content in response.get("content", {}).values():
                    assert content["schema"].get("$ref", "").rpartition("/")[2] in {*schemas, ""}
            if path not in PROBES:
                error = responses["default"]["content"]["application/json"]["schema"]
                assert error == {"$ref": "#/components/schemas/ErrorBody"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
        ("/v1/embeddings", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/models", None),
        ("/version", None),
        ("/load", None),
    ],
)
def test_document_names_the_fields_that_are_answered(client: httpx.Client, path: str, body: dict[str, Any] | None):
    document = client.get("/openapi.json").json()
    answer = (client.get(path) if body is None else client.post(path, json=body)).json()
    operation = document["paths"][path]["get" if body is None else "post"]
    name = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schema = document["components"]["schemas"][name]
    assert set(schema.get("required", ())) <= answer.keys() <= schema["properties"].keys()


def test_document_and_page_are_made_once(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch):
    with served(engine) as client:
        first = [client.get(path).text for path in ("/openapi.json", "/docs")]
        monkeypatch.setattr("opsin.server.app.complete", None)
        monkeypatch.setattr("opsin.server.app.reference_page", None)
        assert [client.get(path).text for path in ("/openapi.json", "/docs")] == first


def test_document_tells_which_routes_want_a_key(engine: AsyncLLM):
    document = create_app(engine, ServerConfig(api_key=("k",)), model=NAME).openapi()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    wanting = {path for path, methods in document["paths"].items() if any("security" in m for m in methods.values())}
    assert wanting == document["paths"].keys() - OPEN
    assert "securitySchemes" not in create_app(engine, ServerConfig(), model=NAME).openapi()["components"]


def test_page_shows_what_is_written_as_text():
    described = {"get": {"description": "<b>not</b> bold"}}
    page, _ = reference_page({"info": {"title": "<t>", "version": "1"}, "paths": {"/<x>": described}})
    assert "<t>" not in page
    assert "<x>" not in page
    assert "&lt;b&gt;not&lt;/b&gt; bold" in page
