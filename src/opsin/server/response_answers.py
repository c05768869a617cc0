"""What ``POST /v1/responses`` answers with, in OpenAI's form."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from opsin.server.answers import ChatTokenLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct):
    """Text of a message."""

    text: str
    logprobs: list[ChatTokenLogprob]
    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = []


class OutputMessage(msgspec.Struct, tag="message", tag_field="type"):
    """What the model said."""

    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputFunctionCall(msgspec.Struct, tag="function_call", tag_field="type"):
    """A call that the model asks for; ``arguments`` is the text of a JSON object."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = OutputMessage | OutputFunctionCall


class InputTokensDetails(msgspec.Struct):
    """Of the prompt's tokens, those found in the prefix cache, and those that stand for pictures."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0
    multimodal_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    """Of the answer's tokens, those that nobody is shown: none."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens"]


class ModelResponse(msgspec.Struct):
    """The answer; fields that the request has are told again."""

    id: str
    created_at: int
    model: str
    status: Status
    output: list[OutputItem]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    incomplete_details: IncompleteDetails | None = None
    error: None = None
    object: Literal["response"] = "response"
    background: bool = False
    previous_response_id: None = None
    store: bool = False
    user: str | None = None


class ResponseEvent(msgspec.Struct):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ModelResponse | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[ChatTokenLogprob] | UnsetType = UNSET


class ResponseErrorEvent(msgspec.Struct):
    """The end of a stream that failed. ``error`` says it again, in the form that other streams have."""

    sequence_number: int
    message: str
    code: str | None
    param: str | None
    error: Any
    type: Literal["error"] = "error"
