"""Large bodies, whose long strings are taken out of the JSON while they come: no step ever handles all of one.

Decoding holds up every thread for about a millisecond per MiB, nearly all of it spent on the base64 of pictures. What
is left without such strings is small. It says by marks, which nobody can guess, where they belong.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import msgspec

from opsin.server.errors import BodyTooLargeError

MAX_TEXT_BYTES = 8 * 2**20  # bodies up to here are decoded whole; beside long strings, larger ones may have as much
_LONG_BYTES = 4096
_STEP_BYTES = 2**16
_BLOCK_CHARS = 2**20

# Outside of strings: up to the quote that begins one which is long, has many escapes or does not end here.
_SHORT_STRINGS = re.compile(rb'(?:[^"]*+"[^"\\]{0,4096}+(?:\\.[^"\\]{0,4096}+){0,64}+")*+[^"]*+', re.DOTALL)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
_ESCAPE_BYTES = 6  # of those that begin with \\u

_Steps = Generator[None, bytes, None]


class Body(NamedTuple):
    """What was read.

    Attributes:
        text: JSON.
        strings: by the marks that stand in ``text``, the strings that belong there.
    """

    text: bytes | bytearray
    strings: Mapping[str, str]


class WholeBody:
    """Takes in a body that is small."""

    def __init__(self) -> None:
        self._text = bytearray()

    def feed(self, data: bytes) -> None:
        """Take in what has come."""
        self._text += data

    def finish(self) -> Body:
        """The body, of which nothing more will come."""
        return Body(self._text, {})


class CutBody:
    """Takes in a body that may be large.

    Every string is decoded by the same rules as in a body that is decoded whole, and what is wrong in one is left where
    it was, so that the same requests and the same errors come of both.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._strings: dict[str, str] = {}
        self._mark = secrets.token_hex(16)
        self._waiting = bytearray()
        self._steps = self._scan()
        next(self._steps)

    def feed(self, data: bytes) -> None:
        """Take in what has come.

        Raises:
            BodyTooLargeError: there is too much beside long strings.
        """
        self._waiting += data
        if len(self._waiting) >= _STEP_BYTES:  # and not bit by bit, since what is undecided is looked at again
            self._pass_on()

    def finish(self) -> Body:
        """The body, of which nothing more will come.

        Raises:
            BodyTooLargeError: there is too much beside long strings.
        """
        self._pass_on()
        with contextlib.suppress(StopIteration):
            self._steps.send(b"")
        return Body(self._text, self._strings)

    def _pass_on(self) -> None:
        data = bytes(self._waiting)
        self._waiting.clear()
        for start in range(0, len(data), _STEP_BYTES):
            self._steps.send(data[start : start + _STEP_BYTES])

    def _scan(self) -> _Steps:
        """Take in pieces up to an empty one, beginning outside of strings."""
        data, at = b"", 0
        while True:
            end = _end(_SHORT_STRINGS, data, at)
            self._keep(data[at:end])
            whole = _STRING.match(data, end)
            if whole is not None and whole.end() - end < _LONG_BYTES:
                self._keep(whole[0])
                at = whole.end()
            elif len(data) - end >= _LONG_BYTES:
                data, at = yield from self._cut(data, end + 1)
            else:
                more = yield
                if not more:
                    self._keep(data[end:])
                    return
                data, at = data[end:] + more, 0

    def _cut(self, data: bytes, at: int) -> Generator[None, bytes, tuple[bytes, int]]:
        """Take in one string, up to behind its quote; then what was not looked at, and from where on."""
        text = ""  # grows in place, as CPython does it for a local name that is the only one
        block: list[str] = []
        broken = bytearray()
        while True:
            end, has_ended = _string_end(data, at)
            piece = data[at:end]
            try:
                block.append(msgspec.json.decode(b'"%b"' % piece, type=str))
            except (msgspec.DecodeError, UnicodeDecodeError):
                broken += piece
                self._check(len(broken))
            if has_ended or sum(map(len, block)) >= _BLOCK_CHARS:
                joined = "".join(block)
                block.clear()
                text += joined
                if not text.isascii():  # no base64, and wider: to be made so takes a copy
                    self._check(len(text))
            if has_ended:
                break
            more = yield
            if not more:
                self._keep(b'"' + broken + data[end:])
                return b"", 0
            data, at = data[end:] + more, 0
        if broken:
            self._keep(b'"%b"' % broken)
        else:
            name = f"{self._mark}-{len(self._strings)}"
            self._strings[name] = text
            self._keep(b'"%b"' % name.encode())
        return data, end + 1

    def _keep(self, text: bytes) -> None:
        self._text += text
        self._check(0)

    def _check(self, num_bytes: int) -> None:
        if len(self._text) + num_bytes > MAX_TEXT_BYTES:
            raise BodyTooLargeError(
                f"The body has more than {MAX_TEXT_BYTES} bytes beside base64 and other long strings."
            )


def _end(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    """Where the match ends of a pattern that always matches."""
    match = pattern.match(data, at)
    assert match is not None
    return match.end()


def _string_end(data: bytes, at: int) -> tuple[int, bool]:
    """Up to where the inside of a string can be decoded by itself, and whether the string ends there."""
    end = data.find(b'"', at)
    if data.find(b"\\", at, len(data) if end < 0 else end) >= 0:
        end = _end(_IN_STRING, data, at)
    elif end < 0:
        end = len(data)
    if data[end : end + 1] == b'"':
        return end, True
    begin = data.rfind(b"\\", max(at, end - _ESCAPE_BYTES + 1), end)
    if begin >= 0 and data[begin + 1 : begin + 2] == b"u" and _is_escape(data, at, begin):
        end = begin  # some of its digits are still to come
    begin = end - _ESCAPE_BYTES
    if begin >= at and _HIGH_SURROGATE.match(data, begin) and _is_escape(data, at, begin):
        end = begin  # its other half may come
    return _sign_end(data, at, end), False


def _is_escape(data: bytes, at: int, begin: int) -> bool:
    """Whether the backslash at ``begin`` is none that is itself escaped."""
    inside = data[at:begin]
    return (len(inside) - len(inside.rstrip(b"\\"))) % 2 == 0


def _sign_end(data: bytes, at: int, end: int) -> int:
    """``end``, or where a sign of UTF-8 begins of which not all bytes come before it."""
    for begin in range(end - 1, max(at, end - 3) - 1, -1):
        if data[begin] >= 0xC0:
            num_bytes = 2 + (data[begin] >= 0xE0) + (data[begin] >= 0xF0)
            return begin if begin + num_bytes > end else end
        if data[begin] < 0x80:
            break
    return end


def restore(value: Any, strings: Mapping[str, str]) -> Any:
    """A decoded value with the strings where their marks are."""
    if type(value) is str:
        return strings.get(value, value)
    if type(value) is list:
        return [restore(item, strings) for item in value]
    if type(value) is dict:
        return {strings.get(key, key): restore(item, strings) for key, item in value.items()}
    return value
