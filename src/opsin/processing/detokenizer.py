"""Tokens to text as they come, and stop strings. Each token costs a constant amount of work.

What is emitted never changes afterwards: half a UTF-8 character waits for its other half. The pieces add up to the
tokenizer's ``decode`` of the whole. (One exception, which no text has: where a byte-fallback tokenizer is fed bytes
that are not UTF-8, ``decode`` of the whole also loses the valid characters next to them, and here they stay.)
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from opsin.processing.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HALF = 3  # bytes of a UTF-8 character that can still be incomplete
_LONG_WINDOW = 16  # tokens


class Detokenizer:
    """The text of one growing sequence.

    Where tokens are bytes, these are decoded as they come. Elsewhere a short window of the last tokens is, with one
    settled piece in front: a piece's text may depend on there being something before it (a leading space).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._window: list[int] = []
        self._settled = 0  # tokens at the window's start that end on a clean boundary
        self._emitted = 0  # characters of the window's text that were given out

    def add(self, token_id: int) -> str:
        """The text that this token settles; often its own, sometimes none."""
        if token_id in self._skipped:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if not self._tokenizer.has_text(token_id):
            return ""  # not even kept: a piece's context must be a piece with text
        self._window.append(token_id)
        text = self._decode(self._window)
        half = len(text) - len(text.rstrip(_REPLACEMENT))
        stable = len(text) - min(half, _MAX_HALF)
        new = text[self._emitted : stable]
        self._emitted = max(self._emitted, stable)
        if half == 0:
            self._slide()
        elif len(self._window) > _LONG_WINDOW:
            self._shorten(text)
        return new

    def read(self, token_ids: Sequence[int]) -> str:
        """What ``add`` of each and ``flush`` make together; faster, and meant for whole answers."""
        kept = [token for token in token_ids if token not in self._skipped and self._tokenizer.has_text(token)]
        text = self._decode(kept)
        if _REPLACEMENT in text:  # broken characters, of which the pieces may keep more
            text = "".join([self.add(token) for token in kept])
            return text + self.flush()
        return text

    def flush(self) -> str:
        """The text that still waited, as far as it goes; the sequence has ended."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        new = self._decode(self._window)[self._emitted :]
        self._emitted += len(new)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _slide(self) -> None:
        """Let the newest piece be the context of the next, if it has text of its own."""
        piece = self._window[self._settled :]
        if piece[-1] in self._tokenizer.byte_ids:
            # Bytes in a row are decoded as one: what follows must not spoil these, so another token stands in.
            piece = [self._tokenizer.letter_id]
        text = self._decode(piece)
        if text:
            self._window = piece
            self._emitted = len(text)
        self._settled = len(self._window)

    def _shorten(self, text: str) -> None:
        """Cut a window of endless broken bytes at a place where both halves decode to what they are together."""
        for cut in range(len(self._window) - 2, len(self._window) - 8, -1):
            tail = self._decode(self._window[cut:])
            head = len(text) - len(tail)
            if tail and head <= self._emitted and self._decode(self._window[:cut]) + tail == text:
                self._window = self._window[cut:]
                self._settled = 0
                self._emitted -= head
                return


class StopMatch(NamedTuple):
    """``stop`` ends at ``end`` characters from the start of all text; it began at ``start``."""

    stop: str
    start: int
    end: int


class StopStrings:
    """Finds the stop string that is completed first, however the text is cut into pieces (Knuth-Morris-Pratt).

    Where two are completed by the same character, the longer one counts.

    Attributes:
        length: characters read so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._tables = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop that the text's end matches
        self.length = 0

    def add(self, text: str) -> StopMatch | None:
        """Read on; the first match, if there is one. Not to be called again after a match."""
        best: StopMatch | None = None
        for i, (stop, table) in enumerate(zip(self._stops, self._tables, strict=True)):
            matched = self._matched[i]
            if matched == 0 and stop[0] not in text:
                continue
            for at, char in enumerate(text if best is None else text[: best.end - self.length - 1]):
                while matched and stop[matched] != char:
                    matched = table[matched - 1]
                if stop[matched] == char:
                    matched += 1
                if matched == len(stop):
                    end = self.length + at + 1
                    best = StopMatch(stop, end - len(stop), end)
                    break
            self._matched[i] = matched
        self.length += len(text)
        return best

    def skip(self, text: str) -> None:
        """Pass over text in which nothing is to be found."""
        self._matched = [0] * len(self._stops)
        self.length += len(text)

    @property
    def pending(self) -> int:
        """Characters at the text's end that may be the beginning of a stop string."""
        return max(self._matched, default=0)


def _borders(stop: str) -> list[int]:
    """For every prefix of ``stop``, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[i] != stop[matched]:
            matched = table[matched - 1]
        if stop[i] == stop[matched]:
            matched += 1
        table[i] = matched
    return table
