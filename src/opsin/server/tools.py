"""What a body says about tools, and how its answer is read for calls."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from opsin.errors import RequestError
from opsin.params import SamplingParams, StructuredOutputsParams
from opsin.server.answers import FunctionCall, ToolCallAnswer
from opsin.server.config import ServerConfig
from opsin.server.requests import ChatCompletionRequest
from opsin.server.tool_parsers import (
    TOOL_PARSERS,
    ListedCalls,
    MistralCalls,
    NamedCall,
    ToolCall,
    ToolParser,
    parser_for_template,
)

_MAX_TOOLS = 128
_MAX_CHARS = 2**20  # templates write tools in one go, in which no other thread runs, at 15 ms a million
_CHARS_OF_VALUE = 16  # about what a value takes beside its text: signs, blanks
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request uses tools.

    Attributes:
        tools: what the template shows; None shows none.
        constraint: what the answer must look like, where a call is demanded.
        new_parser: makes the reader of one answer; None where text is only text.
        finish_reason: what replaces "stop" for an answer with calls.
        at_most_one: further calls of an answer are left out.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    constraint: StructuredOutputsParams | None = None
    new_parser: Callable[[], ToolParser] | None = None
    finish_reason: str = "tool_calls"
    at_most_one: bool = False

    def apply_to(self, params: SamplingParams) -> None:
        """Ask of the sampler what reading the calls needs.

        Raises:
            RequestError: the answer is asked to follow another form besides.
        """
        if self.constraint is not None:
            if params.structured_outputs is not None:
                raise RequestError(
                    "tool_choice demands a call, and another field another form; an answer can follow only one.",
                    param="tool_choice",
                )
            params.structured_outputs = self.constraint
        if self.new_parser is MistralCalls:  # its mark is a special token
            params.skip_special_tokens = False


def tool_use(request: ChatCompletionRequest, parser: str | None) -> ToolUse:
    """Read ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Args:
        parser: the form in which this model writes calls by itself, where one is known.

    Raises:
        RequestError: they are malformed or do not fit one another; ``param`` is the field.
    """
    functions = _functions(request.tools)
    choice = request.tool_choice
    if choice is None:
        choice = "auto" if functions else "none"
    if choice == "none" or (choice == "auto" and not functions):
        return ToolUse(request.tools or None)
    if not functions:
        raise RequestError("tool_choice asks for a tool, but the request has no tools.", param="tool_choice")
    at_most_one = request.parallel_tool_calls is False
    if choice == "auto":
        if parser is None:
            raise RequestError(
                "It is not known how this model writes tool calls. Start the server with --tool-call-parser "
                f"{' or '.join(TOOL_PARSERS)}, or send tool_choice 'required', a named tool, or 'none'.",
                param="tools",
            )
        return ToolUse(request.tools, None, TOOL_PARSERS[parser], at_most_one=at_most_one)
    if choice == "required":
        schema = _list_schema(functions, at_most_one)
        return ToolUse(request.tools, _calls_of(schema), ListedCalls, at_most_one=at_most_one)
    name = _chosen_name(choice)
    if name not in functions:
        raise RequestError(f"tool_choice names {name!r}; the tools are {', '.join(functions)}.", param="tool_choice")
    arguments = _calls_of(functions[name])
    return ToolUse(request.tools, arguments, lambda: NamedCall(name), finish_reason="stop")


def check_size(tools: Sequence[Mapping[str, Any]]) -> None:
    """Refuse descriptions of tools that are longer than contexts are, before a template writes them.

    Raises:
        RequestError: they have about a million characters.
    """
    left = _MAX_CHARS
    values: list[Any] = [*tools]
    while values:
        value = values.pop()
        left -= _CHARS_OF_VALUE + (len(value) if isinstance(value, str) else 0)
        if left < 0:
            raise RequestError(
                f"tools has more than {_MAX_CHARS:,} characters as JSON; describe fewer, or more briefly.",
                param="tools",
            )
        if isinstance(value, Mapping):
            values += value.keys()
            values += value.values()
        elif isinstance(value, list):
            values += value


def tool_parser_name(config: ServerConfig, template: str | None) -> str | None:
    """The parser for calls that the model makes of its own accord; None leaves "auto" unavailable."""
    if not config.enable_auto_tool_choice:
        return None
    return parser_for_template(template or "") if config.tool_call_parser == "auto" else config.tool_call_parser


def _calls_of(schema: dict[str, Any]) -> StructuredOutputsParams:
    # Nobody reads a call's layout, so no tokens are spent on it.
    return StructuredOutputsParams(json=schema, whitespace_pattern=" ?")


class CallCollector:
    """One answer's text and calls, for bodies and for the chunks of a stream; where text is only text, that."""

    def __init__(self, use: ToolUse) -> None:
        self._parser = None if use.new_parser is None else use.new_parser()
        self._at_most_one = use.at_most_one
        self.num_calls = 0
        self._white = ""  # white space that is left out if a call comes next

    def take(self, text: str, ended: bool) -> tuple[str, list[ToolCallAnswer]]:
        """What has become certain with this text: more of the content, and further calls."""
        if self._parser is None:
            return text, []
        pieces = [*self._parser.feed(text), *(self._parser.finish() if ended else ())]
        content: list[str] = []
        calls: list[ToolCallAnswer] = []
        for piece in pieces:
            if isinstance(piece, ToolCall):
                self._white = ""
                if not (self._at_most_one and self.num_calls):
                    calls.append(_answer(piece, self.num_calls))
                    self.num_calls += 1
                continue
            shown = self._white + piece
            kept = shown.rstrip()
            self._white = shown[len(kept) :]
            content.append(kept)
        if ended and not self.num_calls:
            content.append(self._white)
        return "".join(content), calls


def _answer(call: ToolCall, index: int) -> ToolCallAnswer:
    return ToolCallAnswer(f"chatcmpl-tool-{secrets.token_hex(16)}", FunctionCall(call.name, call.arguments), index)


def _functions(tools: Sequence[Any] | None) -> dict[str, dict[str, Any]]:
    """The parameters' schemas by function name, in order."""
    if tools is not None and len(tools) > _MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries; at most {_MAX_TOOLS} are taken.", param="tools")
    found: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools or ()):
        path = f"tools.{i}"
        function = cast("Mapping[str, Any]", tool).get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or cast("Mapping[str, Any]", tool).get("type") != "function":
            raise RequestError(
                'A tool must be {"type": "function", "function": {"name": "...", "parameters": {...}}}.', param=path
            )
        function = cast("Mapping[str, Any]", function)
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(
                f"A function's name must be 1 to 64 letters, digits, dots, dashes or underscores; got {name!r:.100}.",
                param=f"{path}.function.name",
            )
        if name in found:
            raise RequestError(f"Two tools are called {name!r}; names must differ.", param=f"{path}.function.name")
        if schema is not None and not isinstance(schema, Mapping):
            raise RequestError("A function's parameters must be a JSON schema.", param=f"{path}.function.parameters")
        found[name] = {"type": "object", **cast("Mapping[str, Any]", schema or {})}
    return found


def _chosen_name(choice: Any) -> str:
    function = cast("Mapping[str, Any]", choice).get("function") if isinstance(choice, Mapping) else None
    name = cast("Mapping[str, Any]", function).get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            "tool_choice must be 'none', 'auto', 'required' or "
            f'{{"type": "function", "function": {{"name": "..."}}}}; got {choice!r:.200}.',
            param="tool_choice",
        )
    return name


def _list_schema(functions: Mapping[str, dict[str, Any]], at_most_one: bool) -> dict[str, Any]:
    """A list of calls. Each function's schema stands under the list's own "$defs", where its references find it."""
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for name, schema in functions.items():
        place = f"#/$defs/{len(definitions)}"
        definitions[str(len(definitions))] = _moved(schema, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": place}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    whole: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    if at_most_one:
        whole["maxItems"] = 1
    return whole


def _moved(schema: Any, place: str) -> Any:
    """A schema that no longer is the whole document, but a part of it at ``place``."""
    if isinstance(schema, list):
        return [_moved(inner, place) for inner in cast("list[Any]", schema)]
    if not isinstance(schema, Mapping):
        return schema
    moved = {name: _moved(inner, place) for name, inner in cast("Mapping[str, Any]", schema).items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
