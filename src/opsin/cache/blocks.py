"""The pool of KV blocks: who holds which, which hold a known prefix, and which goes next.

It counts references and remembers hashes; it never sees the keys and values themselves. Every operation is O(1) per
block. Block 0 is scratch (padding rows write there) and is never handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Blocks 1 .. num_blocks - 1, each held by any number of requests.

    A block that nobody holds is either blank, or idle: it still has a registered prefix and can be shared again until
    it is evicted, least recently released first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_usable = num_blocks - 1
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out now."""
        return len(self._blank) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks, blank ones first; the caller holds one reference to each."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def find(self, digest: bytes) -> int | None:
        """The block registered under ``digest``, without taking it."""
        return self._by_hash.get(digest)

    def share(self, block: int) -> None:
        """Take one more reference to a block that ``find`` returned."""
        if self._refs[block] == 0:
            del self._idle[block]
        self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give one reference back for each block of a table, given from its start.

        The table's end is released first, so that a long prefix loses its tail before its head.
        """
        for block in reversed(list(blocks)):
            assert self._refs[block] > 0, f"block {block} released more often than taken"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Let others find a held block under ``digest``. The first block of a digest stays; a twin stays unknown."""
        assert self._refs[block] > 0
        assert self._hashes[block] is None
        if digest not in self._by_hash:
            self._by_hash[digest] = block
            self._hashes[block] = digest

    def forget(self, digest: bytes) -> None:
        """Hide what is registered under ``digest``, if anything: its content is not to be trusted."""
        block = self._by_hash.pop(digest, None)
        if block is not None:
            self._hashes[block] = None
            if self._refs[block] == 0:
                del self._idle[block]
                self._blank.append(block)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        digest = self._hashes[block]
        assert digest is not None
        del self._by_hash[digest]
        self._hashes[block] = None
        return block
