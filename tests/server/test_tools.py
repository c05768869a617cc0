"""Tools: calls that the grammar demands, calls that the model makes by itself, and how each form is read."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from opsin import AsyncLLM
from opsin.outputs import RequestOutput
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.tool_parsers import (
    ListedCalls,
    MistralCalls,
    NamedCall,
    TaggedCalls,
    ToolCall,
    ToolParser,
    parser_for_template,
)
from tests.server.conftest import NAME, serving

COUNT = {
    "type": "function",
    "function": {
        "name": "count",
        "parameters": {
            "type": "object",
            "properties": {"what": {"enum": ["cats", "dogs"]}, "most": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["what", "most"],
            "additionalProperties": False,
        },
    },
}
SHOW = {"type": "function", "function": {"name": "show", "description": "Show the picture."}}
MESSAGES = [{"role": "user", "content": "How many cats?"}]
CALL = '<tool_call>\n{"name": "count", "arguments": {"what": "cats"}}\n</tool_call>'
COUNTED = ToolCall("count", '{"what": "cats"}')


def read(parser: ToolParser, pieces: Sequence[str]) -> list[str | ToolCall]:
    """Everything that a parser tells, neighbouring texts joined."""
    told = [piece for text in pieces for piece in parser.feed(text)] + list(parser.finish())
    joined: list[str | ToolCall] = []
    for piece in told:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("parser", "text", "expected"),
    [
        (TaggedCalls, "No call < tool_call> here.", ["No call < tool_call> here."]),
        (TaggedCalls, f"Well: {CALL}{CALL} done", ["Well: ", COUNTED, COUNTED, " done"]),
        (TaggedCalls, CALL.removesuffix("</tool_call>"), [COUNTED]),
        (TaggedCalls, "<tool_call>not JSON</tool_call>!", ["<tool_call>not JSON</tool_call>!"]),
        (TaggedCalls, '<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
        (TaggedCalls, "ends in <tool_", ["ends in <tool_"]),
        (TaggedCalls, "<tool_call>[1", ["<tool_call>[1"]),
        (MistralCalls, 'Now [TOOL_CALLS][{"name": "count", "arguments": {"what": "cats"}}]', ["Now ", COUNTED]),
        (MistralCalls, '[TOOL_CALLS]count[ARGS]{"what": "cats"}[TOOL_CALLS]a[ARGS]{}', [COUNTED, ToolCall("a", "{}")]),
        (MistralCalls, "[TOOL_CALLS]nonsense", ["[TOOL_CALLS]nonsense"]),
        (MistralCalls, "plain [TOOL", ["plain [TOOL"]),
        (ListedCalls, '[{"name": "count", "arguments": {"what": "cats"}}]', [COUNTED]),
        (ListedCalls, '[{"name": "count", "argu', ['[{"name": "count", "argu']),
        (lambda: NamedCall("count"), '{"what": "cats"}', [COUNTED]),
    ],
)
def test_parser_tells_text_and_calls_however_the_answer_is_cut(parser: Any, text: str, expected: list[Any], size: int):
    assert read(parser(), [text[i : i + size] for i in range(0, len(text), size)]) == expected


def test_parser_sends_text_on_at_once_unless_a_tag_may_begin():
    parser = TaggedCalls()
    assert list(parser.feed("A red")) == ["A red"]
    assert list(parser.feed(" circle <tool")) == [" circle "]
    assert list(parser.feed("box>")) == ["<toolbox>"]


@pytest.mark.parametrize(("sign", "name"), [("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ("none", None)])
def test_parser_is_found_by_the_template(sign: str, name: str | None):
    assert parser_for_template("{{ messages }}" + sign) == name


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    given = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 300, "tools": [COUNT, SHOW]}
    return client.post("/v1/chat/completions", json={**given, **body})


def choice_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_chat_named_tool_is_called_with_arguments_in_its_schema(client: httpx.Client):
    choice = choice_of(ask(client, tool_choice={"type": "function", "function": {"name": "count"}}))
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "count"
    assert json.loads(call["function"]["arguments"])["what"] in ("cats", "dogs")
    assert call["type"] == "function"
    assert "index" not in call
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "stop"


def test_chat_required_tool_is_one_of_those_given(client: httpx.Client):
    choice = choice_of(ask(client, tool_choice="required", tools=[COUNT], parallel_tool_calls=False))
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "count"
    assert set(json.loads(call["function"]["arguments"])) == {"what", "most"}
    assert choice["finish_reason"] == "tool_calls"


def test_chat_required_tools_keep_each_their_own_definitions(client: httpx.Client):
    fields = {"type": "object", "required": ["a"], "additionalProperties": False}

    def tool(name: str, **schema: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {**fields, **schema}}}

    tools = [
        tool("first", properties={"a": {"$ref": "#/$defs/Item"}}, **{"$defs": {"Item": {"enum": ["one"]}}}),
        tool("second", properties={"a": {"$ref": "#/$defs/Item"}}, **{"$defs": {"Item": {"enum": ["two"]}}}),
        tool("third", properties={"a": {"$ref": "#/definitions/Item"}}, definitions={"Item": {"enum": ["three"]}}),
        tool("fourth", properties={"a": {"anyOf": [{"const": "end"}, {"$ref": "#"}]}}),
    ]
    allowed = {"first": "one", "second": "two", "third": "three"}
    for seed in range(8):
        body = {"tool_choice": "required", "tools": tools, "temperature": 2, "seed": seed, "max_tokens": 400}
        for call in choice_of(ask(client, parallel_tool_calls=False, **body))["message"].get("tool_calls", ()):
            value = json.loads(call["function"]["arguments"])["a"]
            while isinstance(value, dict):  # the fourth refers to itself
                value = value["a"]
            assert value == allowed.get(call["function"]["name"], "end")


def test_chat_streamed_tool_call_joins_to_the_whole_one(client: httpx.Client):
    body: dict[str, Any] = {"tool_choice": "required", "tools": [COUNT], "parallel_tool_calls": False}
    whole = choice_of(ask(client, **body))["message"]["tool_calls"][0]["function"]
    lines = [line[6:] for line in ask(client, stream=True, **body).text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [(call["index"], call["function"]) for call in calls] == [(0, whole)]
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert not any(choice["delta"].get("content") for choice in choices)


def test_chat_answer_cut_short_in_a_demanded_call_stays_text(client: httpx.Client):
    choice = choice_of(ask(client, tool_choice="required", max_tokens=3))
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("[")
    assert "tool_calls" not in choice["message"]


def test_chat_call_and_its_result_are_read_back(client: httpx.Client):
    call = {"id": "c", "type": "function", "function": {"name": "count", "arguments": '{"what": "cats", "most": 3}'}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ]
    assert choice_of(ask(client, messages=history, tool_choice="none", max_tokens=4))["message"]["content"]


class Scripted:
    """An engine that says what it is told to; otherwise the real one."""

    def __init__(self, engine: AsyncLLM, pieces: Sequence[str]) -> None:
        self._engine = engine
        self._pieces = pieces

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def stream(self, processed: Any, output_kind: Any = "cumulative") -> AsyncGenerator[Any, None]:
        stream = self._engine.stream(processed, "final")
        async for output in stream:
            assert isinstance(output, RequestOutput)
            (answer,) = output.outputs
            if output_kind == "delta":
                for piece in self._pieces:
                    yield replace(output, finished=False, outputs=[replace(answer, text=piece, finish_reason=None)])
                yield replace(output, outputs=[replace(answer, text="", finish_reason="stop")])
            else:
                yield replace(output, outputs=[replace(answer, text="".join(self._pieces), finish_reason="stop")])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("said", "content", "names"),
    [
        (["Let me count. <tool", f"_call>{CALL[11:30]}", CALL[30:], "\n", CALL], "Let me count.", ["count", "count"]),
        ([CALL], None, ["count"]),
        (["Three ", "cats. "], "Three cats. ", []),
    ],
)
def test_sdk_reads_calls_that_the_model_makes_by_itself(
    engine: AsyncLLM, said: list[str], content: str | None, names: list[str], stream: bool
):
    config = ServerConfig(served_model_name=(NAME,), tool_call_parser="hermes")
    app = create_app(Scripted(engine, said), config, model=NAME)  # type: ignore[arg-type]
    fields: Any = {"model": NAME, "messages": MESSAGES, "tools": [COUNT, SHOW], "max_tokens": 1}
    with serving(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as sdk:
        if stream:
            chunks = list(sdk.chat.completions.create(**fields, stream=True))
            deltas = [chunk.choices[0].delta for chunk in chunks]
            calls = [call for delta in deltas for call in delta.tool_calls or ()]
            text = "".join(delta.content or "" for delta in deltas) or None
            reason = chunks[-1].choices[0].finish_reason
            assert [call.index for call in calls] == list(range(len(names)))
        else:
            choice = sdk.chat.completions.create(**fields).choices[0]
            calls, text, reason = choice.message.tool_calls or [], choice.message.content, choice.finish_reason
    assert [call.function.name for call in calls if call.function] == names
    assert len({call.id for call in calls}) == len(names)
    assert text == content
    assert reason == ("tool_calls" if names else "stop")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "tools", "--tool-call-parser"),  # this model's template shows no form of calls
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "has no tools"),
        ({"tool_choice": "always"}, "tool_choice", "must be"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "must be"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice", "count, show"),
        ({"tools": [{"type": "function"}]}, "tools.0", "must be"),
        ({"tools": [SHOW, "x"]}, "tools.1", "must be"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "letters"),
        ({"tools": [SHOW, SHOW]}, "tools.1.function.name", "differ"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]},
            "tools.0.function.parameters",
            "schema",
        ),
        ({"tools": [SHOW] * 200}, "tools", "at most"),
        ({"tool_choice": "required", "guided_regex": "a"}, "tool_choice", "only one"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "objekt"}}}],
                "tool_choice": "required",
            },
            "tools",
            "not usable",
        ),
    ],
)
def test_chat_tools_that_cannot_be_used_are_a_400(client: httpx.Client, body: dict[str, Any], param: str, words: str):
    response = ask(client, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    "parameters",
    [{"description": "long " * 250_000}, {"properties": {f"p{i}": {"enum": list(range(20))} for i in range(4000)}}],
    ids=["text", "values"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_tools_longer_than_contexts_are_a_400_before_a_template_writes_them(
    client: httpx.Client, path: str, parameters: dict[str, Any]
):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    response = client.post(path, json={"messages": MESSAGES, "tools": [tool], "tool_choice": "none"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert "1,048,576 characters" in response.json()["error"]["message"]


def test_tokenize_counts_the_tools_of_a_conversation(engine: AsyncLLM):
    app = create_app(engine, ServerConfig(trust_request_chat_template=True), model=NAME)
    template = "{{ tools | tojson if tools else '' }}{{ messages[0].content }}"
    body = {"messages": MESSAGES, "chat_template": template}
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        chat = {**body, "tools": [SHOW], "tool_choice": "none", "max_tokens": 1}
        used = client.post("/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"]
        assert client.post("/tokenize", json={**body, "tools": [SHOW]}).json()["count"] == used
        assert client.post("/tokenize", json=body).json()["count"] < used


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_call_with_a_number_that_json_lacks_is_text(number: str):
    text = f'<tool_call>{{"name": "f", "arguments": {{"x": {number}}}}}</tool_call>'
    parser = TaggedCalls()
    assert [*parser.feed(text), *parser.finish()] == [text]
