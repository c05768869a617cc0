"""``POST /v1/responses``: a chat, asked for and answered in the form of OpenAI's Responses API."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.outputs import CompletionOutput, RequestOutput
from opsin.params import SamplingParams
from opsin.server.answers import ChatTokenLogprob, ToolCallAnswer, Usage
from opsin.server.chat import answer_chat
from opsin.server.errors import ErrorBody, ResponseNotFoundError
from opsin.server.generation import Form, Framing
from opsin.server.logprobs import chat_logprobs
from opsin.server.response_answers import (
    IncompleteDetails,
    InputTokensDetails,
    ModelResponse,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseErrorEvent,
    ResponseEvent,
    ResponseUsage,
    Status,
)
from opsin.server.response_input import ResponsesRequest, asked_chat
from opsin.server.state import ServerState
from opsin.server.tools import CallCollector, ToolUse


async def create_response(http: HTTPRequest, server: ServerState) -> Response:
    """Answer one conversation, in the form of OpenAI's Responses API. Nothing is kept of it."""
    request = await server.read(http, ResponsesRequest)
    chat = asked_chat(request)
    name = server.name_of(http, request, "resp", "_")

    def new_form(name: str, params: SamplingParams, use: ToolUse) -> Form:
        return _ResponseForm(_begun(name, server.names[0], request, params), params.logprobs, use)

    with chat.blamed():
        return await answer_chat(http, server, chat.request, name, new_form)


async def find_response(name: str) -> Response:
    """404: responses are not kept, so there is none to be had, cancelled or deleted."""
    raise ResponseNotFoundError(f"There is no response {name!r:.200}: this server keeps none (store is ignored).")


def _begun(name: str, model: str, request: ResponsesRequest, params: SamplingParams) -> ModelResponse:
    """The answer before there is any."""
    return ModelResponse(
        id=name,
        created_at=int(time.time()),
        model=model,
        status="in_progress",
        output=[],
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        reasoning={"effort": None, "summary": None, **(request.reasoning or {})},
        temperature=params.temperature,
        text={"format": {"type": "text"}, **(request.text or {})},
        tool_choice="auto" if request.tool_choice is None else request.tool_choice,
        tools=request.tools or [],
        top_logprobs=request.top_logprobs or 0,
        top_p=params.top_p,
        truncation=request.truncation or "disabled",
        user=request.user,
    )


def _named(event: msgspec.Struct) -> bytes:
    kind: str = event.type  # type: ignore[attr-defined]
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


class _ResponseForm:
    """Responses and their events. A whole answer is what its events would have told.

    Args:
        begun: the answer before there is any; it is filled.
        top: alternatives to tell per token; None tells no log-probabilities.
        use: how the answer is read for tool calls.
    """

    framing = Framing(_named, b"")

    def __init__(self, begun: ModelResponse, top: int | None, use: ToolUse) -> None:
        self._response = begun
        self._top = top
        self._collector = CallCollector(use)
        self._number = 0
        self._text: OutputText | None = None  # of the message that is being written
        self._cut = False

    def opening(self) -> list[ResponseEvent]:
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=msgspec.structs.replace(self._response)) for kind in kinds]

    def events(self, prompt: int, output: RequestOutput, usage: Usage | UnsetType | None) -> list[ResponseEvent]:
        (answer,) = output.outputs
        ended = answer.finish_reason is not None
        text, calls = self._collector.take(answer.text, ended)
        events: list[ResponseEvent] = []
        logprobs = self._logprobs(answer)
        if text or logprobs:
            events += self._say(text, logprobs)
        for call in calls:
            events += [*self._end_message("completed"), *self._call(call)]
        if ended:
            self._cut = answer.finish_reason == "length"
            if not self._response.output:  # clients look for a message
                events += self._begin_message()
            events += self._end_message("incomplete" if self._cut else "completed")
        return events

    def closing(self, usage: Usage, *, tell_usage: bool) -> list[ResponseEvent]:
        kind = "response.incomplete" if self._cut else "response.completed"
        return [self._event(kind, response=self._finish(usage))]

    def failure(self, body: ErrorBody) -> ResponseErrorEvent:
        error = body.error
        return ResponseErrorEvent(self._number, error.message, error.code, error.param, error)

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> ModelResponse:
        (output,) = outputs
        self.events(0, output, None)
        return self._finish(usage)

    def _finish(self, usage: Usage) -> ModelResponse:
        response = self._response
        response.status = "incomplete" if self._cut else "completed"
        response.incomplete_details = IncompleteDetails("max_output_tokens") if self._cut else None
        details = InputTokensDetails()
        if usage.prompt_tokens_details is not UNSET:
            details.cached_tokens = usage.prompt_tokens_details.cached_tokens
            details.multimodal_tokens = usage.prompt_tokens_details.multimodal_tokens
        response.usage = ResponseUsage(
            usage.prompt_tokens, details, usage.completion_tokens, OutputTokensDetails(), usage.total_tokens
        )
        return response

    def _logprobs(self, answer: CompletionOutput) -> list[ChatTokenLogprob]:
        if self._top is None or answer.logprobs is None:
            return []
        return chat_logprobs(answer.token_ids, answer.logprobs, self._top).content

    # ------------------------------------------------------------------------------------------------ events

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(kind, self._number - 1, **fields)

    def _of_item(self, kind: str, **fields: Any) -> ResponseEvent:
        """An event about the last item."""
        output = self._response.output
        return self._event(kind, item_id=output[-1].id, output_index=len(output) - 1, **fields)

    def _item_event(self, kind: str, item: OutputItem) -> ResponseEvent:
        return self._event(kind, item=item, output_index=len(self._response.output) - 1)

    def _say(self, text: str, logprobs: list[ChatTokenLogprob]) -> list[ResponseEvent]:
        events = [] if self._text is not None else self._begin_message()
        assert self._text is not None
        self._text.text += text
        self._text.logprobs += logprobs
        return [*events, self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _begin_message(self) -> list[ResponseEvent]:
        message = OutputMessage(f"msg_{secrets.token_hex(16)}", "in_progress", [])
        self._response.output.append(message)
        self._text = OutputText("", [])
        events = [
            self._item_event("response.output_item.added", msgspec.structs.replace(message, content=[])),
            self._of_item("response.content_part.added", content_index=0, part=OutputText("", [])),
        ]
        message.content.append(self._text)
        return events

    def _end_message(self, status: Status) -> list[ResponseEvent]:
        if self._text is None:
            return []
        message = self._response.output[-1]
        message.status = status
        text, self._text = self._text, None
        return [
            self._of_item("response.output_text.done", content_index=0, text=text.text, logprobs=text.logprobs),
            self._of_item("response.content_part.done", content_index=0, part=text),
            self._item_event("response.output_item.done", message),
        ]

    def _call(self, call: ToolCallAnswer) -> list[ResponseEvent]:
        function = call.function
        item = OutputFunctionCall(
            f"fc_{secrets.token_hex(16)}", call.id, function.name, function.arguments, "completed"
        )
        self._response.output.append(item)
        begun = msgspec.structs.replace(item, arguments="", status="in_progress")
        return [
            self._item_event("response.output_item.added", begun),
            self._of_item("response.function_call_arguments.delta", delta=function.arguments),
            self._of_item("response.function_call_arguments.done", name=function.name, arguments=function.arguments),
            self._item_event("response.output_item.done", item),
        ]
