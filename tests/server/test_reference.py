"""``/docs``: all routes and fields, and nothing from elsewhere."""

from __future__ import annotations

import re

import httpx

from opsin.server.reference import reference_page


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
    assert re.findall(r'(?:src|href)="([^"]*)"', answer.text) == ["/openapi.json"]


def test_page_shows_what_is_written_as_text():
    described = {"get": {"description": "<b>not</b> bold"}}
    page, _ = reference_page({"info": {"title": "<t>", "version": "1"}, "paths": {"/<x>": described}})
    assert "<t>" not in page
    assert "<x>" not in page
    assert "&lt;b&gt;not&lt;/b&gt; bold" in page
