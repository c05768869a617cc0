"""One request's KV blocks: taken from the pool as the request grows, shared with others that begin alike."""

from __future__ import annotations

from collections.abc import Callable

from opsin.cache.blocks import BlockPool
from opsin.cache.prefix import BlockHasher


class BlockTable:
    """The blocks of a request's positions, from the first on. Each is held until ``release``.

    Args:
        pool: where blocks come from and go back to.
        block_size: positions per block.
        hasher: names the request's prefixes; None when it shares none, neither others' nor its own.
    """

    def __init__(self, pool: BlockPool, block_size: int, hasher: BlockHasher | None) -> None:
        self._pool = pool
        self._block_size = block_size
        self._hasher = hasher
        self._blocks: list[int] = []
        self._num_sent = 0
        self._num_published = 0  # leading blocks that others can find, or that were refused as twins

    def __len__(self) -> int:
        return len(self._blocks)

    def num_missing(self, num_positions: int) -> int:
        """Blocks to add so that ``num_positions`` fit; may be <= 0."""
        return -(-num_positions // self._block_size) - len(self._blocks)

    def grow(self, num_blocks: int) -> None:
        """Take so many more blocks; the pool must have them free."""
        self._blocks += self._pool.allocate(num_blocks)

    def take_unsent(self) -> tuple[int, ...]:
        """The blocks added since this was last asked, for a runner that has the rest."""
        if self._num_sent == len(self._blocks):
            return ()
        unsent = tuple(self._blocks[self._num_sent :])
        self._num_sent = len(self._blocks)
        return unsent

    def share(self, num_positions: int, limit: int, cut: Callable[[int], int]) -> int:
        """Add blocks that others have computed, as long as the next one is known.

        Args:
            num_positions: those computed so far; nothing is found when they end inside a block.
            limit: the most positions that may be shared in all; their tokens are known.
            cut: the last position up to a given one where the shared ones may end.

        Returns:
            Positions that are computed then, ``num_positions`` at least.
        """
        hasher, held = self._hasher, len(self._blocks)
        if hasher is None or num_positions != held * self._block_size:
            return num_positions
        found: list[int] = []
        for number in range(held, limit // self._block_size):
            block = self._pool.find(hasher.digest(number))
            if block is None:
                break
            found.append(block)
        end = held + len(found)
        while end > held and (stop := cut(end * self._block_size)) < end * self._block_size:
            end = stop // self._block_size
        if end <= held:
            return num_positions
        del found[end - held :]
        for block in found:
            self._pool.share(block)
        self._blocks += found
        self._num_published = end
        return end * self._block_size

    def name(self, num_positions: int) -> None:
        """Do the work of naming the blocks that the first ``num_positions`` will fill; their tokens are known."""
        if self._hasher is not None and num_positions >= self._block_size:
            self._hasher.digest(num_positions // self._block_size - 1)

    def publish(self, num_positions: int) -> None:
        """Let others find the blocks that the first ``num_positions`` fill; their tokens are known."""
        if self._hasher is None:
            return
        num_full = num_positions // self._block_size
        while self._num_published < num_full:
            number = self._num_published
            self._pool.register(self._blocks[number], self._hasher.digest(number))
            self._num_published += 1

    def forget(self) -> None:
        """Hide from others all that this request has named: it may hold bad values, also what it got from others."""
        if self._hasher is not None:
            for digest in self._hasher.known:
                self._pool.forget(digest)

    def release(self) -> None:
        """Give every block back; what was published can be found until it is evicted."""
        self._pool.release(self._blocks)
        self._blocks = []
        self._num_sent = self._num_published = 0
