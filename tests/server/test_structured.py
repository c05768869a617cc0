"""Answers in a form that the request asks for, in every spelling that clients use."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.server.conftest import NAME

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "many": {"type": "boolean"}},
    "required": ["colour", "many"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Hello"}]
NOWHERE = {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": NOWHERE}}


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(
        "/v1/chat/completions",
        json={"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 300, **body},
    )


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
        {"guided_json": SCHEMA},
    ],
    ids=["response_format", "structured_outputs", "compact", "guided"],
)
def test_chat_asked_for_a_schema_answers_in_it(client: httpx.Client, body: dict[str, Any]):
    answer = json.loads(said(ask(client, **body)))
    assert set(answer) == {"colour", "many"}
    assert answer["colour"] in ("red", "blue")


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-c]"}}, "[0-9]{3}-[a-c]"),
        ({"guided_regex": "[0-9]{2}"}, "[0-9]{2}"),
        ({"structured_outputs": {"choice": ["cat", "dog"]}}, "cat|dog"),
        ({"guided_choice": ["cat", "dog"]}, "cat|dog"),
        ({"guided_grammar": 'root ::= "a" | "bc"'}, "a|bc"),
    ],
)
def test_chat_asked_for_a_form_answers_in_it(client: httpx.Client, body: dict[str, Any], pattern: str):
    assert re.fullmatch(pattern, said(ask(client, **body)))


def test_chat_streamed_json_is_whole(client: httpx.Client):
    body = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "stream": True}
    lines = [line[6:] for line in ask(client, **body).text.splitlines() if line.startswith("data: {")]
    parts = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
    assert json.loads("".join(parts))["colour"] in ("red", "blue")


def test_completions_follow_a_form_too(client: httpx.Client):
    body = {"model": NAME, "prompt": "Hello", "max_tokens": 20, "structured_outputs": {"choice": ["yes", "no"]}}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format", "json_schema"),
        ({"response_format": "json_object"}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs its schema"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "regexp"),
        ({"structured_outputs": {"regex": "((("}}, "structured_outputs", "not usable"),
        ({"structured_outputs": "json"}, "structured_outputs", "must be an object"),
        ({"guided_choice": []}, "guided_choice", "non-empty"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "only one of them"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "structured_outputs"),
    ],
)
def test_chat_constraint_that_cannot_be_followed_is_a_400(
    client: httpx.Client, body: dict[str, Any], param: str, words: str
):
    response = ask(client, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": {"json": NOWHERE}}, "structured_outputs"),
        ({"guided_json": NOWHERE}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": NOWHERE}}}, "response_format"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
    ],
)
def test_form_that_cannot_be_compiled_is_blamed_on_the_field_that_asked_for_it(
    client: httpx.Client, body: dict[str, Any], param: str
):
    response = ask(client, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param} is not usable")


def test_completion_form_that_cannot_be_compiled_is_blamed_on_its_field(client: httpx.Client):
    error = client.post("/v1/completions", json={"prompt": "a", "guided_grammar": "root ::= ("}).json()["error"]
    assert error["param"] == "guided_grammar"
    assert "structured_outputs" not in error["message"]
