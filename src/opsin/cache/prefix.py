"""Names for prefixes: a chained hash per KV block, over everything that its keys and values depend on.

That is the tokens up to the block's end, the media rows that replace some of them, the rotary positions, and the
ranges that see one another. A later token inside such a range changes earlier blocks too, so the caller must not let
a hit end inside one; the ranges' own ends are part of the hash.
"""

from __future__ import annotations

import struct
from array import array
from hashlib import blake2b

from opsin.types import EngineRequest

DIGEST_BYTES = 16


class BlockHasher:
    """The chain of one request, computed as far as asked.

    Args:
        request: its spans, ranges and positions are read.
        tokens: the prompt, to which the owner appends what is generated.
        block_size: tokens per block.
        root: requests share prefixes only under equal roots.
    """

    def __init__(self, request: EngineRequest, tokens: list[int], block_size: int, root: tuple[str, ...]) -> None:
        self._request = request
        self._num_prompt = len(request.prompt_token_ids)
        self._tokens = tokens
        self._block_size = block_size
        self._parent = blake2b(repr(root).encode(), digest_size=DIGEST_BYTES).digest()
        self._chain: list[bytes] = []
        self._next_span = 0
        self._next_range = 0

    def digest(self, block: int) -> bytes:
        """Hash of block ``block`` and all before it; its tokens must be known. O(1) when asked in order."""
        while len(self._chain) <= block:
            self._extend()
        return self._chain[block]

    @property
    def known(self) -> list[bytes]:
        """The digests computed so far."""
        return self._chain

    def _extend(self) -> None:
        start = len(self._chain) * self._block_size
        end = start + self._block_size
        tokens = self._tokens[start:end]
        assert len(tokens) == self._block_size, "a block is hashed only when all its tokens are known"
        hasher = blake2b(self._chain[-1] if self._chain else self._parent, digest_size=DIGEST_BYTES)
        hasher.update(array("i", tokens).tobytes())
        self._add_spans(hasher, start, end)
        self._add_ranges(hasher, end)
        hasher.update(self._unusual_positions(start, end))
        self._chain.append(hasher.digest())

    def _add_spans(self, hasher: blake2b, start: int, end: int) -> None:
        spans = self._request.spans
        while self._next_span < len(spans) and spans[self._next_span].start < end:
            span = spans[self._next_span]
            span_end = span.start + span.length
            if span_end > start:
                first = max(span.start, start)
                key = self._request.media[span.item].key
                place = (first - start, min(span_end, end) - first, span.feature_start + first - span.start, len(key))
                hasher.update(struct.pack("<c4q", b"s", *place) + key)
            if span_end > end:
                break
            self._next_span += 1

    def _add_ranges(self, hasher: blake2b, end: int) -> None:
        ranges = self._request.bidirectional
        while self._next_range < len(ranges) and ranges[self._next_range][0] < end:
            hasher.update(struct.pack("<c2q", b"r", *ranges[self._next_range]))
            if ranges[self._next_range][1] > end:
                break
            self._next_range += 1

    def _unusual_positions(self, start: int, end: int) -> bytes:
        """The block's rotary positions, or nothing where they are plain indices, as in a prompt without media."""
        positions, num_prompt = self._request.positions, self._num_prompt
        if positions is None:
            return b""
        cut = max(start, min(end, num_prompt))
        delta = self._request.position_delta
        generated = array("i", range(cut + delta, end + delta)).tobytes()
        rows = [
            (positions[axis + 4 * start : axis + 4 * cut] if cut > start else b"") + generated
            for axis in range(0, len(positions), 4 * num_prompt)
        ]
        plain = array("i", range(start, end)).tobytes()
        return b"" if all(row == plain for row in rows) else b"p" + b"".join(rows)
