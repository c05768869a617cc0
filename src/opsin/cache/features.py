"""Policy of the vision-feature cache: which items are asked for, encoded, kept and dropped.

An item's features go through four states:

    ABSENT --take_needs--> ASKED --payload_ready--> READY --encode--> STORED
       ^________________________________________________________________|  evicted

Requests lease the items that they still have to read. Leased features stay; the rest is kept, least recently used
first to go. The cache is sized in bytes of features, and payloads (pixels waiting for the tower) have a budget of
their own. Both are given out in the order of the line: a lease's rank is (place of its request, first position of
the item). Only the item named ``urgent``, the first that the oldest request misses, may take room from leases of
higher rank. As the items that one request needs at once fit the cache (checked when it is added), the oldest request
always gets its features, so there is no deadlock.

No tensor is here: the executor holds payloads by key and features by the integer ids given out here.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from enum import Enum
from typing import NamedTuple

from opsin.media.raw import raw_plan
from opsin.types import EncodeItem, MediaItem, MediaNeed

MAX_STEP_BYTES = 2**28
"""Payloads that one step moves to the device. Pictures that the device resizes may be large and of few patches."""

Order = tuple[int, int]
"""A request's place in the line: (priority, number of arrival). Lower is served first; unique."""


class Lease(NamedTuple):
    """Why a request wants an item: the prompt position of its first feature, and whom to ask for the payload."""

    position: int
    request_id: str
    item: int


class _State(Enum):
    ABSENT = 0
    ASKED = 1
    READY = 2
    STORED = 3


class _Entry:
    __slots__ = ("asked_of", "feature_id", "item", "leases", "num_bytes", "payload_bytes", "state")

    def __init__(self, item: MediaItem, row_bytes: int, as_features: bool, max_raw_pixels: int) -> None:
        self.item = item
        self.num_bytes = item.layout.num_features * row_bytes
        plan = raw_plan(item.layout.plan, max_raw_pixels) or item.layout.plan
        self.payload_bytes = plan.num_bytes or self.num_bytes  # embeddings come as they are
        if as_features:
            self.payload_bytes = max(self.payload_bytes, self.num_bytes)
        self.state = _State.ABSENT
        self.asked_of: Order | None = None
        self.feature_id: int | None = None
        self.leases: dict[Order, Lease] = {}

    @property
    def rank(self) -> tuple[Order, int]:
        order = min(self.leases)
        return order, self.leases[order].position


_Queue = list[tuple[Order, int, bytes]]


class FeatureCache:
    """See the module's text.

    Args:
        capacity_bytes: features kept at once.
        row_bytes: bytes of one feature row.
        payload_budget_bytes: payloads asked for and not yet encoded; one larger item goes alone.
        as_features: payloads may have become features already when they come.
        max_raw_pixels: see ``media.raw.raw_plan``, which says of which items the payload is the picture as it is.
    """

    def __init__(
        self,
        capacity_bytes: int,
        row_bytes: int,
        payload_budget_bytes: int,
        *,
        as_features: bool = False,
        max_raw_pixels: int = 0,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.row_bytes = row_bytes
        self.used_bytes = 0
        self.payload_bytes = 0
        self._payload_budget = payload_budget_bytes
        self._as_features = as_features
        self._max_raw_pixels = max_raw_pixels
        self._entries: dict[bytes, _Entry] = {}
        self._idle: OrderedDict[bytes, _Entry] = OrderedDict()  # stored, not leased
        self._idle_bytes = 0
        # Heaps by rank. A lease pushes once per state it passes through; stale tuples are dropped when they surface.
        self._absent: _Queue = []
        self._ready: _Queue = []
        self._free_ids: list[int] = []
        self._num_ids = 0
        self._dropped_features: list[int] = []
        self._dropped_payloads: dict[bytes, None] = {}

    def feature_id(self, key: bytes) -> int | None:
        """Id of the stored features, or None."""
        entry = self._entries.get(key)
        return entry.feature_id if entry is not None else None

    # -------------------------------------------------------------------------------------- leases

    def lease(self, item: MediaItem, order: Order, lease: Lease) -> None:
        """Keep, or make, the item's features until ``release``. A request leases equal items once."""
        entry = self._entries.get(item.key)
        if entry is None:
            entry = self._entries[item.key] = _Entry(item, self.row_bytes, self._as_features, self._max_raw_pixels)
        assert order not in entry.leases
        if entry.state is _State.STORED and not entry.leases:
            del self._idle[item.key]
            self._idle_bytes -= entry.num_bytes
        entry.leases[order] = lease
        self._enqueue(entry, order)

    def release(self, key: bytes, order: Order, *, ended: bool = False) -> None:
        """End a lease. Features stay as cache; a payload that nobody else wants is dropped.

        Args:
            ended: the request itself has ended, so a need that named it is void; others who want the item ask again.
        """
        entry = self._entries[key]
        del entry.leases[order]
        if not entry.leases:
            self._unlease(entry)
        elif ended and entry.state is _State.ASKED and entry.asked_of == order:
            entry.state = _State.ABSENT
            self.payload_bytes -= entry.payload_bytes
            for other in entry.leases:
                self._enqueue(entry, other)

    # ------------------------------------------------------------------------------------ payloads

    def take_needs(self, urgent: bytes | None) -> list[MediaNeed]:
        """Items whose payload is to be supplied now, by rank, as far as the budget goes."""
        needs: list[MediaNeed] = []
        while (top := self._top(self._absent, _State.ABSENT)) is not None:
            order, entry = top
            while not self._payload_fits(entry) and entry.item.key == urgent:
                ready = [other for other in self._entries.values() if other.state is _State.READY]
                if not ready:
                    break
                self._drop_payload(max(ready, key=lambda other: other.rank))
            if not self._payload_fits(entry):
                break
            entry.state = _State.ASKED
            entry.asked_of = order
            self.payload_bytes += entry.payload_bytes
            lease = entry.leases[order]
            needs.append(MediaNeed(entry.item.key, lease.request_id, lease.item))
        return needs

    def wants(self, key: bytes) -> bool:
        """The item's payload was asked for and is still to come."""
        entry = self._entries.get(key)
        return entry is not None and entry.state is _State.ASKED

    def payload_ready(self, key: bytes) -> None:
        """The executor now holds a payload that ``wants`` said is wanted."""
        assert self.wants(key), "a payload came that nobody waits for"
        # A drop not yet sent, meant for an older payload of this key, must not hit the new one.
        self._dropped_payloads.pop(key, None)
        entry = self._entries[key]
        entry.state = _State.READY
        for order in entry.leases:
            self._enqueue(entry, order)

    def payload_failed(self, key: bytes) -> list[Order]:
        """There will be no payload. Returns the requests that wanted it; they still hold their leases."""
        if not self.wants(key):
            return []
        entry = self._entries[key]
        entry.state = _State.ABSENT
        self.payload_bytes -= entry.payload_bytes
        return sorted(entry.leases)

    def _payload_fits(self, entry: _Entry) -> bool:
        return self.payload_bytes == 0 or self.payload_bytes + entry.payload_bytes <= self._payload_budget

    def _drop_payload(self, entry: _Entry) -> None:
        entry.state = _State.ABSENT
        self.payload_bytes -= entry.payload_bytes
        self._dropped_payloads[entry.item.key] = None
        for order in entry.leases:
            self._enqueue(entry, order)

    # ------------------------------------------------------------------------------------ features

    def encode(self, max_patches: int, urgent: bytes | None) -> list[EncodeItem]:
        """Choose what the tower runs in this step, by rank; what it stores counts as stored from here on.

        At most ``max_patches`` and ``MAX_STEP_BYTES`` in all; one larger item goes alone. Evicts, so it comes before
        any row of the step is planned; ``take_drops`` afterwards has the evicted ids, which may be in use again already
        (a step drops before it encodes).
        """
        chosen: list[EncodeItem] = []
        num_patches = num_bytes = 0
        while (top := self._top(self._ready, _State.READY)) is not None:
            _, entry = top
            layout = entry.item.layout
            num_patches += layout.num_patches
            num_bytes += entry.payload_bytes
            if chosen and (num_patches > max_patches or num_bytes > MAX_STEP_BYTES):
                break
            if not self._make_room(entry, urgent):
                break
            if not self._free_ids:
                self._free_ids.append(self._num_ids)
                self._num_ids += 1
            entry.feature_id = self._free_ids.pop()
            entry.state = _State.STORED
            self.used_bytes += entry.num_bytes
            self.payload_bytes -= entry.payload_bytes
            chosen.append(EncodeItem(entry.feature_id, entry.item.key, layout))
        return chosen

    def take_drops(self) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """Feature ids and payload keys that the next step's plan must drop."""
        drops = tuple(self._dropped_features), tuple(self._dropped_payloads)
        self._dropped_features.clear()
        self._dropped_payloads.clear()
        return drops

    @property
    def leased_bytes(self) -> int:
        """Bytes of stored features that some request still has to read."""
        return self.used_bytes - self._idle_bytes

    @property
    def has_drops(self) -> bool:
        return bool(self._dropped_features or self._dropped_payloads)

    def _make_room(self, entry: _Entry, urgent: bytes | None) -> bool:
        excess = self.used_bytes + entry.num_bytes - self.capacity_bytes
        if excess > self._idle_bytes and entry.item.key != urgent:
            return False
        while self.used_bytes + entry.num_bytes > self.capacity_bytes:
            victim = next(iter(self._idle.values()), None) or self._last_leased(entry.rank)
            if victim is None:
                return False
            self._evict(victim)
        return True

    def _last_leased(self, rank: tuple[Order, int]) -> _Entry | None:
        """The stored entry that is last in line, if it comes after ``rank``."""
        leased = [entry for entry in self._entries.values() if entry.state is _State.STORED and entry.leases]
        last = max(leased, key=lambda entry: entry.rank, default=None)
        return last if last is not None and last.rank > rank else None

    def _evict(self, entry: _Entry) -> None:
        assert entry.feature_id is not None
        self._dropped_features.append(entry.feature_id)
        self._free_ids.append(entry.feature_id)
        entry.feature_id = None
        entry.state = _State.ABSENT
        self.used_bytes -= entry.num_bytes
        if entry.leases:
            for order in entry.leases:
                self._enqueue(entry, order)
        else:
            del self._idle[entry.item.key]
            self._idle_bytes -= entry.num_bytes
            del self._entries[entry.item.key]

    # -------------------------------------------------------------------------------------- queues

    def _enqueue(self, entry: _Entry, order: Order) -> None:
        """Put one lease in line for what the entry's state waits for."""
        place = (order, entry.leases[order].position, entry.item.key)
        if entry.state is _State.ABSENT:
            heapq.heappush(self._absent, place)
        elif entry.state is _State.READY:
            heapq.heappush(self._ready, place)

    def _top(self, queue: _Queue, state: _State) -> tuple[Order, _Entry] | None:
        while queue:
            order, _, key = queue[0]
            entry = self._entries.get(key)
            if entry is not None and entry.state is state and order in entry.leases:
                return order, entry
            heapq.heappop(queue)
        return None

    def _unlease(self, entry: _Entry) -> None:
        """The last lease is gone."""
        if entry.state is _State.STORED:
            self._idle[entry.item.key] = entry
            self._idle_bytes += entry.num_bytes
        elif entry.state is _State.READY:
            self._drop_payload(entry)
            del self._entries[entry.item.key]
        else:
            if entry.state is _State.ASKED:  # the answer will find nobody waiting
                self.payload_bytes -= entry.payload_bytes
            del self._entries[entry.item.key]
