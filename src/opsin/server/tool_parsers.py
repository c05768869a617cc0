"""From a model's text to the tool calls in it, as the text grows.

Each family writes calls in its own way. A parser is fed the answer piece by piece and returns what has become certain:
text, which may be sent on at once, and calls, which are told when they are complete. Text that only looks like a call
is text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast


class ToolCall(NamedTuple):
    """A call that is complete; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


Pieces = Sequence[str | ToolCall]


class ToolParser(Protocol):
    """Reads one answer."""

    def feed(self, text: str) -> Pieces:
        """Take in more of the answer; what is certain now, in order."""
        ...

    def finish(self) -> Pieces:
        """The answer has ended; what is left."""
        ...


class TaggedCalls:
    """Calls between two tags, each a JSON object with "name" and "arguments": Qwen's and Hermes' form."""

    def __init__(self, start: str = "<tool_call>", end: str = "</tool_call>") -> None:
        self._start = start
        self._end = end
        self._held = ""  # not yet certain: a tag that may be beginning, or the inside of a call
        self._inside = False

    def feed(self, text: str) -> Pieces:
        pieces: list[str | ToolCall] = []
        # Only the new text, and as much before it as a tag may reach back, can bring a tag.
        searched = len(self._held)
        self._held += text
        while True:
            tag = self._end if self._inside else self._start
            at = self._held.find(tag, max(0, searched - len(tag)))
            if at < 0:
                break
            before, self._held = self._held[:at], self._held[at + len(tag) :]
            searched = 0
            if not self._inside:
                pieces.append(before)
            else:
                call = read_call(before)
                pieces.append(call or f"{self._start}{before}{self._end}")
            self._inside = not self._inside
        if not self._inside:
            kept = overlap(self._held, self._start)
            pieces.append(self._held[: len(self._held) - kept])
            self._held = self._held[len(self._held) - kept :]
        return [piece for piece in pieces if piece]

    def finish(self) -> Pieces:
        rest, self._held = self._held, ""
        if not self._inside:
            return [rest] if rest else []
        self._inside = False
        return [read_call(rest) or self._start + rest]  # models stop at the end of a call without its tag


class MistralCalls:
    """Everything behind ``[TOOL_CALLS]``: a JSON list of calls, or names each with ``[ARGS]`` and an object."""

    _MARK = "[TOOL_CALLS]"
    _ARGS = "[ARGS]"

    def __init__(self) -> None:
        self._held = ""
        self._calls: list[str] | None = None

    def feed(self, text: str) -> Pieces:
        if self._calls is not None:
            self._calls.append(text)
            return []
        self._held += text
        at = self._held.find(self._MARK)
        if at >= 0:
            before, self._calls = self._held[:at], [self._held[at + len(self._MARK) :]]
            self._held = ""
        else:
            kept = overlap(self._held, self._MARK)
            before, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return [before] if before else []

    def finish(self) -> Pieces:
        if self._calls is None:
            rest, self._held = self._held, ""
            return [rest] if rest else []
        text = "".join(self._calls)
        return self._listed(text) or self._named(text) or [self._MARK + text]

    def _listed(self, text: str) -> list[ToolCall]:
        calls = [_call_of(item) for item in _json_list(text)]
        found = [call for call in calls if call is not None]
        return found if len(found) == len(calls) else []

    def _named(self, text: str) -> list[ToolCall]:
        calls: list[ToolCall] = []
        for part in text.split(self._MARK):
            name, mark, arguments = part.partition(self._ARGS)
            if not mark or not name.strip() or not isinstance(_loads(arguments), dict):
                return []
            calls.append(ToolCall(name.strip(), arguments.strip()))
        return calls


class ListedCalls:
    """An answer that a grammar holds to a JSON list of calls, for ``tool_choice="required"``."""

    def __init__(self) -> None:
        self._text: list[str] = []

    def feed(self, text: str) -> Pieces:
        self._text.append(text)
        return []

    def finish(self) -> Pieces:
        text = "".join(self._text)
        calls = [_call_of(item) for item in _json_list(text)]
        found = [call for call in calls if call is not None]
        return found or ([text] if text else [])


class NamedCall:
    """An answer that a grammar holds to the arguments of the one function that was asked for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._text: list[str] = []

    def feed(self, text: str) -> Pieces:
        self._text.append(text)
        return []

    def finish(self) -> Pieces:
        return [ToolCall(self._name, "".join(self._text))]


TOOL_PARSERS: Mapping[str, Callable[[], ToolParser]] = {"hermes": TaggedCalls, "mistral": MistralCalls}
"""By the names that vLLM gives them."""

_SIGNS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}


def parser_for_template(template: str) -> str | None:
    """The form of calls that a chat template teaches its model, if it is one that is known."""
    return next((name for name, sign in _SIGNS.items() if sign in template), None)


def read_call(text: str) -> ToolCall | None:
    """A call written as a JSON object, or None where it is not one."""
    return _call_of(_loads(text))


def _call_of(value: Any) -> ToolCall | None:
    if not isinstance(value, Mapping):
        return None
    call = cast("Mapping[str, Any]", value)
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # twice encoded
        arguments = _loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        return None
    try:
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except ValueError:  # a number beyond a float, such as 1e999
        return None


def _json_list(text: str) -> list[Any]:
    value = _loads(text)
    return cast("list[Any]", value) if isinstance(value, list) else []


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of ``tag`` with which ``text`` ends."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
