"""Keeps what users write from being read as control tokens.

A chat template mixes trusted text (its own special tokens and picture placeholders) with text from the request. Before
rendering, every control string inside a user's text is put between two marks; after rendering, the marks tell which
control strings are the user's, and those are tokenised as plain text. The marks are Unicode noncharacters, which are
reserved for a program's own use; they are removed from incoming text first, so they cannot be forged.

A user may also try to have a control string appear only after rendering: split over two parts, or nested so that a
template's own ``replace`` uncovers it. So marks are also left where a text could be continued, and any control
string that touches a mark counts as the user's. All of it is one pass over the text.
"""

# Conversations are nested JSON of any shape.
# pyright: standard

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

OPEN = "\ufdd0"
CLOSE = "\ufdd1"
_MARK = re.compile(f"[{OPEN}{CLOSE}]")
_PATTERN_REACH = 64  # the longest match that a placeholder pattern is expected to have

Span = tuple[int, int]


class Rendered(NamedTuple):
    """A rendered prompt. ``plain`` lists the [start, end) character ranges of control strings that users wrote."""

    text: str
    plain: Sequence[Span] = ()


class ControlStrings:
    """The strings that mean something to the model: special tokens, and placeholders of pictures.

    Args:
        literals: strings to find as they are.
        patterns: regular expressions to find, each with a text that it matches.
    """

    def __init__(self, literals: Iterable[str], patterns: Mapping[str, str] | None = None) -> None:
        patterns = patterns or {}
        self._literals = frozenset(s for s in literals if s)
        self._lengths = sorted({len(s) for s in self._literals}, reverse=True)
        self._first = _any_of({s[0] for s in self._literals})
        self._begins = _any_of({s[0] for s in (*self._literals, *patterns.values())})
        self._patterns = [re.compile(p) for p in patterns]
        self._reach = max([*self._lengths, _PATTERN_REACH])

    def find(self, text: str) -> list[Span]:
        """[start, end) of every control string, in order; where several start together, the longest."""
        spans: list[Span] = []
        if self._first is not None:
            end = 0
            for hit in self._first.finditer(text):
                start = hit.start()
                if start < end:
                    continue
                for length in self._lengths:
                    literal = text[start : start + length]  # shorter at the text's end
                    if literal in self._literals:
                        end = start + len(literal)
                        spans.append((start, end))
                        break
        for pattern in self._patterns:
            spans.extend(match.span() for match in pattern.finditer(text) if match.end() > match.start())
        if self._patterns:
            spans = _merge(spans)
        return spans

    def mark(self, text: str) -> str:
        """Put marks around the control strings of a user's text, and one where it might be continued into another."""
        text = _MARK.sub("", text)
        pieces: list[str] = []
        done = 0
        for start, end in self.find(text):
            pieces += (text[done:start], OPEN, text[start:end], CLOSE)
            done = end
        rest = text[done:]
        body = rest.rstrip()  # before trailing blanks, which templates like to trim
        tail = body[-self._reach :]
        if self._begins is not None and self._begins.search(tail):
            rest = body + CLOSE + rest[len(body) :]
        return "".join(pieces) + rest

    def mark_all(self, value: Any) -> Any:
        """``mark`` every string inside nested lists and mappings, keys included."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {self._mark_key(k): self.mark_all(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark_all(v) for v in value]
        return value

    def unmark(self, marked: str) -> Rendered:
        """Take the marks out of a rendered prompt and say which of its control strings users wrote."""
        pieces: list[str] = []
        marks: list[Span] = []
        opened: int | None = None
        length = done = 0
        for hit in _MARK.finditer(marked):
            pieces.append(marked[done : hit.start()])
            length += hit.start() - done
            done = hit.end()
            if hit.group() == OPEN:
                opened = length
                marks.append((length, length))
            else:
                marks.append((length if opened is None else opened, length))
                opened = None
        if not marks:
            return Rendered(marked)
        pieces.append(marked[done:])
        text = "".join(pieces)
        return Rendered(text, _touched(self.find(text), marks))

    def _mark_key(self, key: Any) -> Any:
        # Only a key that holds a control string is changed: no template looks such a key up by name.
        return self.mark(key) if isinstance(key, str) and self.find(key) else key


def _any_of(chars: set[str]) -> re.Pattern[str] | None:
    return re.compile("[" + re.escape("".join(sorted(chars))) + "]") if chars else None


def _merge(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _touched(spans: list[Span], marks: list[Span]) -> list[Span]:
    """The spans that overlap a marked range, or have a lone mark strictly inside. Both lists are sorted by start."""
    touched: list[Span] = []
    marks = sorted(marks)
    first = 0
    for start, end in spans:
        while first < len(marks) and marks[first][1] <= start:
            first += 1
        at = first
        while at < len(marks) and marks[at][0] < end:
            if marks[at][1] > start:
                touched.append((start, end))
                break
            at += 1
    return touched
