"""Names for prefixes: a chained hash per KV block, over everything that its keys and values depend on.

That is the tokens up to the block's end, the media rows that replace some of them, the rotary positions, and the
ranges that see one another. A later token inside such a range changes earlier blocks too, so the caller must not let
a hit end inside one; the ranges' own ends are part of the hash.
"""

from __future__ import annotations

import struct
from array import array
from functools import cached_property
from hashlib import blake2b

import numpy as np

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
        self._tokens = tokens
        self._ids = array("i")  # of the tokens, as far as looked at
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
        if len(self._ids) < end:
            self._ids.extend(self._tokens[len(self._ids) :])
        assert len(self._ids) >= end, "a block is hashed only when all its tokens are known"
        parts = [self._chain[-1] if self._chain else self._parent, self._ids[start:end].tobytes()]
        self._add_spans(parts, start, end)
        self._add_ranges(parts, end)
        if self._request.positions is not None:
            self._add_positions(parts, len(self._chain))
        self._chain.append(blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest())

    def _add_spans(self, parts: list[bytes], start: int, end: int) -> None:
        spans = self._request.spans
        while self._next_span < len(spans) and spans[self._next_span].start < end:
            span = spans[self._next_span]
            span_end = span.start + span.length
            if span_end > start:
                first = max(span.start, start)
                key = self._request.media[span.item].key
                place = (first - start, min(span_end, end) - first, span.feature_start + first - span.start, len(key))
                parts += struct.pack("<c4q", b"s", *place), key
            if span_end > end:
                break
            self._next_span += 1

    def _add_ranges(self, parts: list[bytes], end: int) -> None:
        ranges = self._request.bidirectional
        while self._next_range < len(ranges) and ranges[self._next_range][0] < end:
            parts.append(struct.pack("<c2q", b"r", *ranges[self._next_range]))
            if ranges[self._next_range][1] > end:
                break
            self._next_range += 1

    def _add_positions(self, parts: list[bytes], block: int) -> None:
        """Add the block's rotary positions; nothing where they are plain indices, as in a prompt without media."""
        shifts, data = self._prompt_shifts
        shift = shifts[block] if block < len(shifts) else self._request.position_delta
        if shift is None:
            size = len(data) // len(shifts)
            parts += b"p", data[block * size : (block + 1) * size]
        elif shift:
            parts.append(struct.pack("<cq", b"d", shift))

    @cached_property
    def _prompt_shifts(self) -> tuple[list[int | None], bytes]:
        """By how much the rotary positions differ from indices, over the blocks that the prompt takes part in.

        Returns:
            For each block the number, None where there are several; and all of them as int32, block by block.
        """
        request, num_prompt = self._request, len(self._request.prompt_token_ids)
        positions_AP = np.frombuffer(request.positions or b"", np.int32).reshape(-1, num_prompt)
        num_blocks = -(-num_prompt // self._block_size)
        num_axes = len(positions_AP)
        shifted_AT = np.full((num_axes, num_blocks * self._block_size), request.position_delta, np.int32)
        shifted_AT[:, :num_prompt] = positions_AP - np.arange(num_prompt, dtype=np.int32)
        shifted_NAB = np.swapaxes(shifted_AT.reshape(num_axes, num_blocks, self._block_size), 0, 1)
        low, high = shifted_NAB.min(axis=(1, 2)).tolist(), shifted_NAB.max(axis=(1, 2)).tolist()
        return [a if a == b else None for a, b in zip(low, high, strict=True)], shifted_NAB.tobytes()
