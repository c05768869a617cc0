"""``POST /v1/responses``: the body, and the chat that it asks for. Nothing is kept between requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from opsin.errors import RequestError
from opsin.server.requests import ChatCompletionRequest, SamplingRequest

_LOGPROBS = "message.output_text.logprobs"
_ROLES = ("user", "assistant", "system", "developer")
_UNFINISHED = ("in_progress", "incomplete")


class ResponsesRequest(SamplingRequest, kw_only=True):
    """``POST /v1/responses``: OpenAI's Responses API, without memory: every request brings its whole conversation.

    Attributes:
        input: text, or a list of messages, function calls and their outputs; content parts are those of chats and
            ``input_text``, ``input_image``, ``output_text``.
        instructions: a system message in front of it.
        max_output_tokens: longest answer. By default what the context holds.
        text: {"format": {"type": "text" | "json_object" | "json_schema", ...}}.
        tools: functions that the model may ask to be called: {"type": "function", "name": ..., "parameters": {...}}.
        tool_choice: "none", "auto", "required", or {"type": "function", "name": ...}.
        include: ["message.output_text.logprobs"] tells log-probabilities, and those of ``top_logprobs`` alternatives.
        reasoning: {"effort": ...} is given to the chat template.
        store: responses are never kept, whatever is asked for.
        previous_response_id: refused, and so are ``conversation``, ``prompt`` and ``background``.
        truncation: a prompt that does not fit is refused, whatever is asked for.
    """

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    truncation: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None


_NOT_KEPT = "This server keeps no responses; send the whole conversation as input."
_REFUSED = {
    "conversation": _NOT_KEPT,
    "background": f"{_NOT_KEPT} It therefore answers none in the background.",
    "prompt": "Prompt templates are not supported; send instructions and input.",
}
_FIELDS = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input"}


class AskedChat(NamedTuple):
    """A response as the chat that it asks for.

    Attributes:
        paths: per message, where it stands in the body.
    """

    request: ChatCompletionRequest
    paths: Sequence[str]

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Give errors about the chat the names of the body's own fields."""
        try:
            yield
        except RequestError as error:
            error.param = None if error.param is None else self._own_name(error.param)
            raise

    def _own_name(self, param: str) -> str:
        field, _, rest = param.partition(".")
        if field == "messages" and rest:
            number, _, rest = rest.partition(".")
            own = self.paths[int(number)]
            if own in ("input", "instructions"):
                return own
            return ".".join(filter(None, (own, rest)))
        if field == "tools":  # Responses have no object around a function
            return param.replace(".function", "", 1)
        return _FIELDS.get(field, param)


def asked_chat(request: ResponsesRequest) -> AskedChat:
    """The chat that a body asks for.

    Raises:
        RequestError: it asks for what is kept, or is malformed; ``param`` is the field.
    """
    if request.previous_response_id is not None:
        raise RequestError(_NOT_KEPT, code="previous_response_not_found", param="previous_response_id")
    for name, reason in _REFUSED.items():
        if getattr(request, name):
            raise RequestError(reason, param=name)
    if request.n not in (None, 1):
        raise RequestError("n is not a field of responses, which have one answer; leave it out.", param="n")
    messages, paths = _messages(request)
    format = (request.text or {}).get("format")
    if format is not None and request.response_format is not None:
        raise RequestError("The request has text.format and response_format; give one.", param="text.format")
    logprobs = _LOGPROBS in (request.include or ())
    last = messages[-1] if messages else {}
    common: dict[str, Any] = {name: getattr(request, name) for name in SamplingRequest.__struct_fields__}
    common["response_format"] = _response_format(format) if format is not None else request.response_format
    if common["continue_final_message"] is None:  # an answer that was cut short is gone on with
        common["continue_final_message"] = last.get("status") in _UNFINISHED
    chat = ChatCompletionRequest(
        **common,
        messages=[{key: value for key, value in message.items() if key != "status"} for message in messages],
        max_completion_tokens=request.max_output_tokens,
        logprobs=logprobs,
        top_logprobs=request.top_logprobs if logprobs else None,
        tools=None if request.tools is None else [_tool(tool, i) for i, tool in enumerate(request.tools)],
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=(request.reasoning or {}).get("effort"),
    )
    return AskedChat(chat, paths)


# ------------------------------------------------------------------------------------------------------- input


def _messages(request: ResponsesRequest) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages of a chat, and where each stands in the body."""
    messages: list[dict[str, Any]] = []
    paths: list[str] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
        paths.append("instructions")
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}], [*paths, "input"]
    if not request.input:
        raise RequestError("input must be text or a non-empty list of items.", param="input")
    for i, item in enumerate(request.input):
        path = f"input.{i}"
        message = _message(item, path)
        if message is None:
            continue
        before = messages[-1] if messages else {}
        if "tool_calls" in message and before.get("role") == "assistant":  # one turn, as templates expect it
            before.setdefault("tool_calls", []).extend(message["tool_calls"])
            continue
        messages.append(message)
        paths.append(path)
    return messages, paths


def _message(item: Any, path: str) -> dict[str, Any] | None:
    """One item as a message; None for items that say nothing to the model."""
    if not isinstance(item, Mapping):
        raise RequestError(f"An input item must be an object, got {type(item).__name__}.", param=path)
    item = cast("Mapping[str, Any]", item)
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise RequestError(f"role is {role!r:.100}; it must be one of {', '.join(_ROLES)}.", param=f"{path}.role")
        _check_parts(item.get("content"), f"{path}.content")
        message: dict[str, Any] = {"role": role, "content": item.get("content")}
        if role == "assistant" and "status" in item:
            message["status"] = item["status"]
        return message
    if kind == "function_call":
        for name in ("call_id", "name", "arguments"):
            if not isinstance(item.get(name), str):
                raise RequestError(f"A function_call must have {name}, a string.", param=f"{path}.{name}")
        function = {"name": item["name"], "arguments": item["arguments"]}
        return {"role": "assistant", "tool_calls": [{"id": item["call_id"], "type": "function", "function": function}]}
    if kind == "function_call_output":
        if not isinstance(item.get("call_id"), str):
            raise RequestError("A function_call_output must have call_id, a string.", param=f"{path}.call_id")
        _check_parts(item.get("output"), f"{path}.output")
        return {"role": "tool", "tool_call_id": item["call_id"], "content": item.get("output")}
    if kind == "reasoning":
        return None
    raise RequestError(
        f"Input items of type {kind!r:.100} are not supported; use message, function_call or function_call_output"
        + (f". {_NOT_KEPT}" if kind == "item_reference" else "."),
        param=f"{path}.type",
    )


def _check_parts(content: Any, path: str) -> None:
    """Refuse parts that name an uploaded file; the others are looked at as those of chats are."""
    for j, part in enumerate(cast("list[Any]", content) if isinstance(content, list) else ()):
        if isinstance(part, Mapping) and cast("Mapping[str, Any]", part).get("file_id") is not None:
            raise RequestError(
                "This server keeps no files, so file_id means nothing here; send the picture as image_url, a URL or a "
                "data URL.",
                param=f"{path}.{j}.file_id",
            )


# ------------------------------------------------------------------------------------------------ forms, tools


def _response_format(format: Any) -> Any:
    """``text.format`` as ``response_format``, which has an object around the schema."""
    if not isinstance(format, Mapping) or cast("Mapping[str, Any]", format).get("type") != "json_schema":
        return format
    return {"type": "json_schema", "json_schema": {key: value for key, value in format.items() if key != "type"}}


def _tool(tool: Any, i: int) -> Any:
    """A tool as chats have it."""
    kind: Any = cast("Mapping[str, Any]", tool).get("type") if isinstance(tool, Mapping) else None
    if kind != "function":
        raise RequestError(
            f"Only tools of type 'function' can be called from here; got {kind!r:.100}.", param=f"tools.{i}.type"
        )
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _tool_choice(choice: Any) -> Any:
    """``tool_choice`` as chats have it."""
    if isinstance(choice, Mapping) and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice
