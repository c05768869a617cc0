"""The line: every unfinished request in the order in which they are served, and where each of them stands."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from opsin.cache.features import Order
from opsin.scheduler.sequence import Sequence


class Line:
    """Requests by their order. Each is running (has a slot), parked (cannot start before an item is stored) or waiting.

    It alone changes a request's ``slot`` and ``parked_on``.

    Args:
        num_slots: how many can run at once.

    Attributes:
        running: those that have a slot, first in line first.
    """

    def __init__(self, num_slots: int) -> None:
        self.running: list[Sequence] = []
        self._alive: dict[Order, Sequence] = {}
        self._by_id: dict[str, Sequence] = {}
        self._parked: dict[bytes, dict[Order, Sequence]] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        # Heaps that may hold orders whose request has moved on; they are skipped when they surface.
        self._orders: list[Order] = []
        self._waiting: list[Order] = []
        self._block_holders: list[Order] = []  # negated, so that the last in line is on top

    def __len__(self) -> int:
        return len(self._alive)

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, by arrival; they may leave meanwhile."""
        return iter(tuple(self._alive.values()))

    def __getitem__(self, order: Order) -> Sequence:
        return self._alive[order]

    def find(self, request_id: str) -> Sequence | None:
        """By the request's id."""
        return self._by_id.get(request_id)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def head(self) -> Sequence | None:
        """The first in line, wherever it stands."""
        while self._orders and self._orders[0] not in self._alive:
            heapq.heappop(self._orders)
        return self._alive[self._orders[0]] if self._orders else None

    def next_waiting(self) -> Sequence | None:
        """The first in line of those that wait."""
        while self._waiting:
            seq = self._alive.get(self._waiting[0])
            if seq is not None:
                return seq
            heapq.heappop(self._waiting)
        return None

    # --------------------------------------------------------------------------------------- moves

    def add(self, seq: Sequence) -> None:
        """A new request waits."""
        self._alive[seq.order] = self._by_id[seq.request.request_id] = seq
        heapq.heappush(self._orders, seq.order)
        heapq.heappush(self._waiting, seq.order)

    def start(self, seq: Sequence) -> None:
        """Waiting to running; ``seq`` is ``next_waiting``, and a slot is free."""
        self._pop_waiting(seq)
        seq.slot = self._free_slots.pop()
        insort(self.running, seq, key=lambda other: other.order)

    def stop(self, seq: Sequence) -> None:
        """Running to waiting."""
        self._free_slot(seq)
        heapq.heappush(self._waiting, seq.order)

    def park(self, seq: Sequence, key: bytes) -> None:
        """Waiting to parked, for the item ``key``; ``seq`` is ``next_waiting``."""
        self._pop_waiting(seq)
        seq.parked_on = key
        self._parked.setdefault(key, {})[seq.order] = seq

    def unpark(self, seq: Sequence) -> None:
        """Parked to waiting, where it is parked: whether it can start is to be looked at afresh."""
        if seq.parked_on is not None:
            self._leave_parked(seq)
            heapq.heappush(self._waiting, seq.order)

    def unpark_all(self, key: bytes) -> None:
        """``unpark`` those that are parked for an item."""
        for seq in tuple(self._parked.get(key, {}).values()):
            self.unpark(seq)

    def remove(self, seq: Sequence) -> None:
        """It has ended."""
        del self._alive[seq.order], self._by_id[seq.request.request_id]
        if seq.slot is not None:
            self._free_slot(seq)
        if seq.parked_on is not None:
            self._leave_parked(seq)

    def _pop_waiting(self, seq: Sequence) -> None:
        order = heapq.heappop(self._waiting)
        assert order == seq.order, f"{seq.order} is not the first that waits, {order} is"

    def _free_slot(self, seq: Sequence) -> None:
        assert seq.slot is not None
        self.running.remove(seq)
        self._free_slots.append(seq.slot)
        seq.slot = None

    def _leave_parked(self, seq: Sequence) -> None:
        assert seq.parked_on is not None
        others = self._parked[seq.parked_on]
        del others[seq.order]
        if not others:
            del self._parked[seq.parked_on]
        seq.parked_on = None

    # -------------------------------------------------------------------------------------- blocks

    def add_block_holder(self, seq: Sequence) -> None:
        """A request without a slot has got blocks, which it need not keep."""
        heapq.heappush(self._block_holders, (-seq.order[0], -seq.order[1]))

    def num_blocks_held_behind(self, seq: Sequence) -> int:
        """Blocks of those behind ``seq`` who have no slot; shared ones are counted for each."""
        orders = {(-priority, -number) for priority, number in self._block_holders}
        behind = [self._alive[order] for order in orders if order > seq.order and order in self._alive]
        return sum([len(other.blocks) for other in behind if other.slot is None])

    def last_block_holder(self) -> Sequence | None:
        """The last in line of those who hold blocks without a slot."""
        while self._block_holders:
            priority, number = self._block_holders[0]
            seq = self._alive.get((-priority, -number))
            if seq is not None and seq.slot is None and seq.blocks:
                return seq
            heapq.heappop(self._block_holders)
        return None
