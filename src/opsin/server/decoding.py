"""From the bytes of a body to one of ``requests``' structs: bounded in everything that decoding costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from opsin.errors import RequestError
from opsin.server.bodies import restore
from opsin.server.requests import Request

T = TypeVar("T", bound=Request)

_MAX_MESSAGES = 4096
_MAX_VALUES = 250_000
_MAX_OBJECTS = 2**15
_MAX_DEPTH = 128
_MAX_SPANS = 256

_PATH = re.compile(r"(.*) - at `(?:key in )?\$(.*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


def decode(body: bytes | bytearray, kind: type[T], strings: Mapping[str, str] | None = None) -> T:
    """Read a JSON body.

    Args:
        strings: what was cut out of it, by the marks that stand for them.

    Raises:
        RequestError: it is not JSON in UTF-8, or a field has the wrong type; ``param`` is that field's path.
    """
    # Decoding holds up everybody else, and costs by the value, not by the byte. Quotes within strings are escaped, so
    # the roles are keys; the commas of prose count as well, of which no context holds so many. Counting in 8 MiB takes
    # 2 ms a sign and 12 ms for the roles, so what is nearly all of such a body is passed over.
    spans = _outside_pictures(body)

    def count(what: bytes) -> int:
        return sum(body.count(what, begin, end) for begin, end in spans)

    num_objects, num_lists = count(b"{"), count(b"[")
    if num_objects > _MAX_MESSAGES and count(b'"role"') > _MAX_MESSAGES:
        raise RequestError(f"The body has more than {_MAX_MESSAGES} messages.", param="messages")
    if count(b",") > _MAX_VALUES:
        raise RequestError(f"The body has more than {_MAX_VALUES} values.")
    if max(num_objects, num_lists) > _MAX_OBJECTS:
        raise RequestError(f"The body has more than {_MAX_OBJECTS} objects or lists.")
    try:
        request = msgspec.json.decode(body, type=kind)
        if num_objects + num_lists > _MAX_DEPTH:
            _check_depth(request)
        if strings:
            for name in request.__struct_fields__:
                setattr(request, name, restore(getattr(request, name), strings))
        return request
    except msgspec.ValidationError as error:
        message, param = _located(str(error))
        raise RequestError(message, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"The body is not valid JSON in UTF-8: {error}") from None
    except RecursionError:
        raise RequestError("The body's JSON is nested too deeply.") from None


def _outside_pictures(body: bytes | bytearray) -> list[tuple[int, int]]:
    """Where a body is no data: URL. A quote before ``data:`` opens a string, or ends the JSON that can be read."""
    spans: list[tuple[int, int]] = []
    at = 0
    while len(spans) < _MAX_SPANS and (begin := body.find(b'"data:', at)) >= 0:
        spans.append((at, begin))
        at = body.find(b'"', begin + 1)
        if at < 0:
            return spans
    return [*spans, (at, len(body))]


def _check_depth(request: Request) -> None:
    """``RecursionError`` where something is nested too deeply for those who will walk it."""
    level: list[Any] = [getattr(request, name) for name in request.__struct_fields__]
    for _ in range(_MAX_DEPTH):
        outer = [value.values() if type(value) is dict else value for value in level if type(value) in (dict, list)]
        level = [inner for values in outer for inner in values if type(inner) in (dict, list)]
        if not level:
            return
    raise RecursionError


def _located(message: str) -> tuple[str, str | None]:
    """msgspec's message taken apart: what is wrong, and where, as ``messages.0.content``."""
    match = _PATH.match(message)
    if match is None:
        missing = re.search(r"missing required field `(.+)`", message)
        return f"{message}.", missing[1] if missing else None
    steps = [name or index for name, index in _STEP.findall(match[2])]
    path = ".".join(step for step in steps if step != "...")
    return f"{path or 'The body'}: {match[1]}.", path or None
