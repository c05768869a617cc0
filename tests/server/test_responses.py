"""``/v1/responses`` with OpenAI's own client, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from opsin import AsyncLLM
from opsin.errors import RequestFailedError
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.server.conftest import NAME, chat, data_url, serving, user
from tests.server.test_errors import Failing

URL = "/v1/responses"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_output_tokens": 8}
EXTRA = {"ignore_eos": True}
LONG = {"temperature": 0, "max_output_tokens": 64, **EXTRA}  # more tokens than could come in two pieces
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "look",
    "description": "Look at something.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"side": {"enum": ["left", "right"]}},
        "required": ["side"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def sdk(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


def picture_input(text: str = "What is this?") -> Any:
    parts = [{"type": "input_image", "image_url": data_url(1), "detail": "auto"}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": parts}]


def refused(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(URL, json={**GREEDY, "input": "Hello", **fields})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_response_is_the_chats_answer(sdk: openai.OpenAI, client: httpx.Client):
    whole = client.post("/v1/chat/completions", json=chat(1, "What is this?")).json()
    response = sdk.responses.create(**GREEDY, input=picture_input(), extra_body=EXTRA)
    assert response.output_text == whole["choices"][0]["message"]["content"]
    assert response.id.startswith("resp_")
    assert response.status == "incomplete"  # eight tokens, and the model would have gone on
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.input_tokens == whole["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == response.usage.input_tokens + 8
    assert (response.object, response.model, response.temperature) == ("response", NAME, 0)


def test_text_and_instructions_are_user_and_system(sdk: openai.OpenAI, client: httpx.Client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    whole = client.post("/v1/chat/completions", json=chat(messages=messages)).json()
    response = sdk.responses.create(**GREEDY, input="Hello", instructions="Be brief.", extra_body=EXTRA)
    assert response.output_text == whole["choices"][0]["message"]["content"]
    assert response.usage is not None
    assert response.usage.input_tokens == whole["usage"]["prompt_tokens"]
    assert response.instructions == "Be brief."


def test_stream_of_events_joins_to_the_response(sdk: openai.OpenAI):
    whole = sdk.responses.create(**GREEDY, input=picture_input(), extra_body=EXTRA)
    events: list[Any] = list(sdk.responses.create(**GREEDY, input=picture_input(), stream=True, extra_body=EXTRA))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert len(kinds) > 8  # a client that lags gets several tokens at once
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == events[-4].text == events[-1].response.output_text == whole.output_text
    assert events[0].response.output == []
    assert events[-1].response.usage == whole.usage.model_copy(
        update={"input_tokens_details": events[-1].response.usage.input_tokens_details}
    )


def test_clients_own_stream_reads_the_events(sdk: openai.OpenAI):
    kinds: list[str] = []
    with sdk.responses.stream(**{**GREEDY, "max_output_tokens": 480}, input="Hello") as stream:
        for event in stream:
            kinds.append(event.type)
        final = stream.get_final_response()
    whole = sdk.responses.create(**{**GREEDY, "max_output_tokens": 480}, input="Hello")
    assert kinds[-1] == "response.completed"
    assert final.status == whole.status == "completed"
    assert final.output_text == whole.output_text


def test_stream_names_its_events_and_ends_without_a_word(client: httpx.Client):
    text = client.post(URL, json={**GREEDY, "input": "Hello", "stream": True}).text
    frames = [frame.split("\n") for frame in text.split("\n\n") if frame]
    for name, data in frames:
        assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
    assert "[DONE]" not in text


class Side(BaseModel):
    side: Literal["left", "right"]


def test_parse_holds_the_answer_to_a_model(sdk: openai.OpenAI):
    response = sdk.responses.parse(
        model=NAME, input=picture_input(), text_format=Side, temperature=0, max_output_tokens=100
    )
    assert response.output_parsed is not None
    assert response.output_parsed.side in ("left", "right")
    assert response.status == "completed"


def test_json_object_is_a_form(sdk: openai.OpenAI):
    response = sdk.responses.create(
        model=NAME,
        input="Hello",
        temperature=0,
        max_output_tokens=60,
        text={"format": {"type": "json_object"}},
        extra_body={"structured_outputs": None},
    )
    assert response.output_text.lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
def test_function_is_called_and_its_output_goes_back(sdk: openai.OpenAI, choice: Any):
    fields: dict[str, Any] = {"model": NAME, "temperature": 0, "max_output_tokens": 100, "tools": [TOOL]}
    fields["parallel_tool_calls"] = False
    asked = picture_input()
    response = sdk.responses.create(**fields, input=asked, tool_choice=choice)
    (call,) = response.output
    assert call.type == "function_call"
    assert call.name == "look"
    assert json.loads(call.arguments)["side"] in ("left", "right")
    assert response.status == "completed"

    events: list[Any] = list(sdk.responses.create(**fields, input=asked, tool_choice=choice, stream=True))
    assert [event.type for event in events][2:] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[3].delta == events[4].arguments == call.arguments
    assert events[2].item.arguments == ""
    assert events[5].item.call_id == events[2].item.call_id

    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It is a wall."}
    said: Any = [*asked, call, output]
    again = sdk.responses.create(**{**fields, "max_output_tokens": 8}, tool_choice="none", input=said)
    assert again.output[0].type == "message"


def test_calls_in_a_row_are_one_turn(client: httpx.Client):
    from opsin.server.response_input import ResponsesRequest, asked_chat

    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}

    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]}
    items: list[Any] = [{"role": "user", "content": "Hi"}, {"type": "reasoning", "id": "r", "summary": []}, said]
    items += [call("a"), call("b"), {"type": "function_call_output", "call_id": "a", "output": "x"}]
    asked = asked_chat(ResponsesRequest(input=items))
    roles = [message["role"] for message in asked.request.messages]
    assert roles == ["user", "assistant", "tool"]
    assert [c["id"] for c in asked.request.messages[1]["tool_calls"]] == ["a", "b"]
    assert asked.paths == ["input.0", "input.2", "input.5"]


def test_logprobs_are_told_where_they_are_asked_for(sdk: openai.OpenAI):
    fields: dict[str, Any] = {**GREEDY, "max_output_tokens": 4, "input": "Hello", "top_logprobs": 2}
    include: Any = ["message.output_text.logprobs"]
    whole: Any = sdk.responses.create(**fields, include=include, extra_body=EXTRA)
    told = whole.output[0].content[0].logprobs
    assert [len(token.top_logprobs) for token in told] == [2] * 4
    assert "".join(token.token for token in told) == whole.output_text
    without: Any = sdk.responses.create(**fields, extra_body=EXTRA)
    assert without.output[0].content[0].logprobs == []


def test_unfinished_answer_is_gone_on_with(client: httpx.Client):
    begun = [*user("Hi"), {"role": "assistant", "content": "A red"}]
    chat_fields = {"messages": begun, "continue_final_message": True, "max_tokens": 4}
    expected = client.post("/v1/chat/completions", json=chat(**chat_fields)).json()
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "incomplete", "content": "A red"}
    body = {**GREEDY, **EXTRA, "max_output_tokens": 4, "input": [{"role": "user", "content": "Hi"}, item]}
    response = client.post(URL, json=body).json()
    assert response["output"][0]["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]


def test_what_clients_send_besides_is_taken(sdk: openai.OpenAI):
    response = sdk.responses.create(
        **GREEDY,
        input="Hello",
        store=True,
        metadata={"a": "b"},
        user="me",
        service_tier="auto",
        truncation="auto",
        reasoning={"effort": "low"},
        include=["reasoning.encrypted_content"],
        prompt_cache_key="key",
        safety_identifier="me",
        text={"verbosity": "low"},
    )
    assert response.metadata == {"a": "b"}
    assert response.to_dict()["store"] is False


def test_kept_responses_are_refused(sdk: openai.OpenAI, client: httpx.Client):
    with pytest.raises(openai.BadRequestError) as error:
        sdk.responses.create(**GREEDY, input="Hello", previous_response_id="resp_1")
    assert error.value.code == "previous_response_not_found"
    assert error.value.param == "previous_response_id"
    for name, value in (("conversation", "c"), ("background", True), ("prompt", {"id": "p"}), ("n", 2)):
        assert refused(client, **{name: value})["param"] == name
    for ask in (sdk.responses.retrieve, sdk.responses.cancel, sdk.responses.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            ask("resp_1")
        assert missing.value.code == "response_not_found"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["Hello"]}, "input.0"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input.0.arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}], "instructions": "x"}, "input.0.content.0"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input.0.content.0.file_id",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}
                ]
            },
            "input.0.content.0.input_image",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ],
)
def test_wrong_field_is_named_as_the_body_has_it(client: httpx.Client, fields: dict[str, Any], param: str):
    assert refused(client, **fields)["param"] == param


def test_stream_that_fails_midway_ends_with_an_error(engine: AsyncLLM):
    app = create_app(Failing(engine, RequestFailedError("logits are not finite"), 2), ServerConfig(), model=NAME)  # type: ignore[arg-type]
    with serving(app) as address:
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as sdk,
            pytest.raises(openai.APIError, match="not finite"),
        ):
            list(sdk.responses.create(model=NAME, input="Hello", stream=True, extra_body=LONG))
        text = httpx.post(f"{address}{URL}", json={"input": "Hello", "stream": True, **LONG}, trust_env=False).text
    last = text.strip().split("\n\n")[-1].split("\n")
    assert last[0] == "event: error"
    error = json.loads(last[1].removeprefix("data: "))
    assert (error["type"], error["code"]) == ("error", "request_failed")
