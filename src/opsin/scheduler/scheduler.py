"""The scheduler: which requests run in the next step, how many tokens of each, and where their keys and values go.

Requests stand in one line, by (priority,) arrival. The head of the line is the oldest unfinished request, and one
rule makes the whole thing live: *the head can always advance*. It may take a slot, KV blocks, feature bytes and
payload budget from those behind it, last in line first, and it has the first pick of the token budget. Everybody else
gets what is left, in order. As the head finishes after a bounded number of steps, so does everybody.

A step lasts as long as all that it does, and every answer that goes on waits for its end. So while there are any, a
step reads only so many prompt tokens and encodes only so many patches beside them: a flood of pictures makes its own
first tokens later, not everybody's next ones. One picture and one chunk are always let in, however large.

``plan`` runs ahead of results: a sequence's tokens are counted when a step that makes them is planned, and known when
it is committed. Three consequences:

* A request that turns out to have ended leaves a zombie row in the step in flight; its result is discarded.
* Slots, blocks and feature ids are handed on at once, also when a step in flight still uses them: the executor runs
  steps in order, so the old use is over before the new one starts.
* A block may be found by its hash from the moment the step that fills it is planned: later steps, and the same step
  (each layer writes all keys and values before any row attends), read it only after it is written.

A preempted request keeps its tokens and starts over, but not before its last token in flight is known.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable

from opsin.cache.blocks import BlockPool
from opsin.cache.features import FeatureCache, Order
from opsin.cache.prefix import BlockHasher
from opsin.errors import RequestError
from opsin.scheduler.admission import check_fits
from opsin.scheduler.limits import SchedulerLimits
from opsin.scheduler.sequence import Grammar, Sequence
from opsin.scheduler.step import Step
from opsin.types import (
    OWN_FAULT,
    EngineRequest,
    FinishReason,
    MediaNeed,
    RequestUpdate,
    RowPlan,
    RowResult,
    SlotOpen,
    StepPlan,
    StepResult,
)


class Scheduler:
    """Plans steps and turns their results into updates. Single-threaded; never blocks, and is told the time.

    Args:
        limits: what may be handed out.
        on_finish: called with the id of every request that ends, for whatever reason.
    """

    def __init__(self, limits: SchedulerLimits, on_finish: Callable[[str], None] | None = None) -> None:
        self.limits = limits
        self._on_finish = on_finish
        self._pool = BlockPool(limits.num_blocks)
        self._features = FeatureCache(
            limits.feature_bytes, limits.feature_row_bytes, limits.pixel_bytes, as_features=limits.encodes_beside
        )
        self._alive: dict[Order, Sequence] = {}
        self._by_id: dict[str, Sequence] = {}
        self._num_added = 0
        self._num_steps = 0
        # An unfinished request is running (has a slot), parked (cannot start before an item is stored) or waiting.
        self._running: list[Sequence] = []  # sorted by order
        self._parked: dict[bytes, dict[Order, Sequence]] = {}
        # Heaps that may hold orders whose request has moved on; they are skipped when they surface.
        self._waiting: list[Order] = []
        self._line: list[Order] = []
        self._block_leases: list[Order] = []  # negated: the last in line of those who hold blocks without a slot
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._in_flight: deque[tuple[int, list[Sequence]]] = deque()
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0

    # ------------------------------------------------------------------------------------ requests

    def add(self, request: EngineRequest, grammar: Grammar | None = None) -> None:
        """Put a request in line; ``grammar`` says what its answer must look like.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            RequestError: it could never run within this engine's limits, or its id is in use.
        """
        priority = request.priority if self.limits.policy == "priority" else 0
        seq = Sequence(request, (priority, self._num_added), self.limits, grammar)
        if request.request_id in self._by_id:
            raise RequestError(f"Request id {request.request_id!r} is in use; ids of unfinished requests must differ.")
        check_fits(seq, self.limits)
        self._num_added += 1
        if request.share_prefix and (self.limits.enable_prefix_caching or request.cache_namespace):
            scope = "" if self.limits.enable_prefix_caching else request.cache_namespace
            seq.hasher = BlockHasher(request, seq.tokens, self.limits.block_size, (scope, request.cache_salt))
        self._alive[seq.order] = self._by_id[request.request_id] = seq
        heapq.heappush(self._line, seq.order)
        self._extend_hits(seq)
        self._hold_without_slot(seq)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request at any moment; None when there is no such request (any more)."""
        seq = self._by_id.get(request_id)
        return self._finish(seq, "abort") if seq is not None else None

    def fail_all(self, message: str, code: str | None = None) -> list[RequestUpdate]:
        """End every request with an error."""
        return [self._finish(seq, "error", message, code) for seq in list(self._alive.values())]

    # --------------------------------------------------------------------------------------- media

    def take_needs(self) -> list[MediaNeed]:
        """Items whose payload must be supplied now.

        An item may be needed again later (its features were evicted, or its payload dropped). A need is void once the
        request it names has ended; if others want the item, it is needed again in their name.
        """
        return self._features.take_needs(self._urgent_item())

    def wants(self, key: bytes) -> bool:
        """The item's payload was asked for, has not come, and somebody still waits for it."""
        return self._features.wants(key)

    def media_ready(self, key: bytes) -> None:
        """The executor now holds the payload of an item that ``wants`` says is wanted."""
        self._features.payload_ready(key)

    def media_failed(self, key: bytes, message: str, code: str | None) -> list[RequestUpdate]:
        """A payload cannot be had: every request that waits for it ends with an error."""
        holders = [self._alive[order] for order in self._features.payload_failed(key)]
        return [self._finish(seq, "error", message, code) for seq in holders]

    # ---------------------------------------------------------------------------------------- plan

    def plan(self, now_s: float = 0.0) -> StepPlan | None:
        """Decide the next step; None when nothing can run before a commit, a payload or a request comes in."""
        if len(self._in_flight) >= self.limits.pipeline_depth:
            return None
        head = self._head()
        if head is not None:
            self._extend_hits(head)  # may end leases on features, which makes room for the item it misses
        max_tokens, max_patches = self.limits.step_budget(any([seq.is_decoding for seq in self._running]))
        # Encoding comes before rows: it may evict features, which no row of this step may then use.
        encode = self._features.encode(max_patches, self._urgent_item())
        for item in encode:
            for seq in tuple(self._parked.get(item.key, {}).values()):
                self._unpark(seq)
        step = Step(self.limits.max_num_batched_tokens, max_tokens, now_s)
        if head is not None and head.slot is None:
            self._start_head(step, head)
        self._plan_running(step, head)
        self._plan_waiting(step)
        planned = step.decodes + step.prefills
        if not (planned or encode or self._features.has_drops):
            return None
        drop_features, drop_payloads = self._features.take_drops()
        plan = StepPlan(
            step=self._num_steps,
            rows=tuple([row for _, row in planned]),
            opened=tuple(step.opened),
            encode=tuple(encode),
            drop_features=drop_features,
            drop_payloads=drop_payloads,
        )
        self._in_flight.append((plan.step, [seq for seq, _ in planned]))
        self._num_steps += 1
        return plan

    def _start_head(self, step: Step, head: Sequence) -> None:
        """Give the oldest request a slot, someone else's if need be."""
        if self._next_waiting() is not head or head.in_flight or self._park_if_blocked(head):
            return
        if not self._free_slots:
            self._preempt(step, self._running[-1])
        self._open(step, head)

    def _plan_running(self, step: Step, head: Sequence | None) -> None:
        # One token per decoding request is set aside, so that prefills do not stall answers. The head is exempt: a
        # bidirectional range may need the whole budget, which it would otherwise wait for without bound.
        num_reserved = sum([seq.is_decoding for seq in self._running])
        for seq in tuple(self._running):
            if seq.slot is None or not seq.is_runnable:  # preempted in this step, or its last token is in flight
                continue
            budget = step.num_tokens_left
            if seq.is_decoding:
                num_reserved -= 1
                num_tokens = 1
            else:
                self._extend_hits(seq)
                num_tokens = step.chunk(seq, self._features, budget if seq is head else budget - num_reserved)
            if 0 < num_tokens <= budget:
                num_blocks = seq.blocks_needed(seq.num_computed + num_tokens)
                if num_blocks <= 0 or self._reserve(step, seq, num_blocks):
                    self._add_row(step, seq, num_tokens, num_blocks)

    def _plan_waiting(self, step: Step) -> None:
        while self._free_slots and not step.is_full and not step.has_preempted:
            seq = self._next_waiting()
            if seq is None or seq.in_flight:  # a preempted request waits for its last token
                return
            self._extend_hits(seq)
            if self._park_if_blocked(seq):
                continue
            num_tokens = step.chunk(seq, self._features, step.num_tokens_left)
            # Room for all its tokens, not for this chunk alone: else it would soon be preempted again.
            if num_tokens <= 0 or not self._reserve(step, seq, seq.blocks_needed(seq.num_tokens)):
                return
            self._open(step, seq)
            self._add_row(step, seq, num_tokens, seq.blocks_needed(seq.num_computed + num_tokens))

    def _add_row(self, step: Step, seq: Sequence, num_tokens: int, num_blocks: int) -> None:
        assert seq.slot is not None
        start = seq.num_computed
        new_blocks: tuple[int, ...] = ()
        if num_blocks > 0:
            seq.blocks += self._pool.allocate(num_blocks)
        if len(seq.blocks) > seq.num_sent_blocks:
            new_blocks = tuple(seq.blocks[seq.num_sent_blocks :])
            seq.num_sent_blocks = len(seq.blocks)
        emits = start + num_tokens == seq.num_tokens
        mask = seq.grammar.mask if emits and seq.grammar is not None else None
        if start >= seq.num_prompt:
            seq.num_computed += num_tokens
            row = RowPlan(seq.slot, start, num_tokens, new_blocks, emits, (), mask)
        else:
            uses = seq.feature_uses(num_tokens, self._features)
            row = RowPlan(seq.slot, start, num_tokens, new_blocks, emits, uses, mask)
            seq.advance(self._features, start + num_tokens)
            self._register(seq)
        if emits:
            seq.num_tokens += 1
        seq.in_flight += 1
        step.add(seq, row)

    # -------------------------------------------------------------------------------------- commit

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestUpdate]:
        """Take in the results of the oldest step in flight."""
        step, seqs = self._in_flight.popleft()
        assert step == plan.step == result.step, f"step {step} is due; got plan {plan.step}, result {result.step}"
        updates: list[RequestUpdate] = []
        for seq, row, row_result in zip(seqs, plan.rows, result.rows, strict=True):
            seq.in_flight -= 1
            if row_result.error is not None and seq.hasher is not None:
                for digest in seq.hasher.known:  # they may hold bad values, also those it got from others
                    self._pool.forget(digest)
            if seq.finished:  # a zombie: it ended while this step was in flight
                continue
            if row_result.error is not None:
                updates.append(self._finish(seq, "error", row_result.error))
                continue
            if seq.prompt_logprobs is not None and row_result.prompt_logprobs is not None:
                begin = row.start + 1
                entries = row_result.prompt_logprobs[: seq.num_prompt - begin]
                seq.prompt_logprobs[begin : begin + len(entries)] = entries
            seq.values.update(row_result.values or {})
            if row.emits:
                updates.append(self._commit_emission(seq, row_result))
        return updates

    def _commit_emission(self, seq: Sequence, result: RowResult) -> RequestUpdate:
        if seq.pools:
            update = self._finish(seq, "stop")
            update.embedding = result.embedding
            update.values = seq.values_in_order()
            return update
        token = result.token_id
        assert token is not None, "a row that emits brings a token"
        reason = seq.accept(token)
        self._register(seq)
        if reason == "error":
            assert seq.grammar is not None
            return self._finish(seq, "error", seq.grammar.error, OWN_FAULT)  # it asked for the impossible
        if reason is not None:
            update = self._finish(seq, reason)
            update.stop_token_id = token if token in seq.request.stop_token_ids and reason == "stop" else None
        else:
            update = RequestUpdate(request_id=seq.request.request_id, num_cached_tokens=seq.num_cached_tokens)
        update.token_ids, update.scheduled_s = [token], seq.scheduled_s
        if result.logprobs is not None:
            update.logprobs = [result.logprobs]
        if seq.prompt_logprobs is not None:
            update.prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None
        return update

    # --------------------------------------------------------------------------------------- state

    @property
    def has_work(self) -> bool:
        """Something is unfinished, in flight, or still to be dropped from the executor."""
        return bool(self._alive or self._in_flight or self._features.has_drops)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def stats(self) -> list[tuple[str, float]]:
        """Gauges and counters by name; counters end in ``_total``."""
        num_blocks_used = self._pool.num_usable - self._pool.num_free
        return [
            ("num_requests_running", len(self._running)),
            ("num_requests_waiting", len(self._alive) - len(self._running)),
            ("num_steps_in_flight", len(self._in_flight)),
            ("kv_blocks_used", num_blocks_used),
            ("kv_cache_usage", num_blocks_used / max(1, self._pool.num_usable)),
            ("feature_bytes_stored", self._features.used_bytes),
            ("feature_bytes_leased", self._features.leased_bytes),
            ("payload_bytes_pending", self._features.payload_bytes),
            ("num_preemptions_total", self._num_preemptions),
            ("prefix_cache_queried_tokens_total", self._num_prompt_tokens),
            ("prefix_cache_hit_tokens_total", self._num_cached_tokens),
        ]

    def _head(self) -> Sequence | None:
        while self._line and self._line[0] not in self._alive:
            heapq.heappop(self._line)
        return self._alive[self._line[0]] if self._line else None

    def _next_waiting(self) -> Sequence | None:
        while self._waiting:
            seq = self._alive.get(self._waiting[0])
            if seq is not None:
                return seq
            heapq.heappop(self._waiting)
        return None

    def _open(self, step: Step, seq: Sequence) -> None:
        """Waiting to running."""
        assert len(seq.tokens) == seq.num_tokens, "all tokens of a request that starts over are known"
        order = heapq.heappop(self._waiting)
        assert order == seq.order
        seq.slot, seq.scheduled_s = self._free_slots.pop(), seq.scheduled_s or step.now_s
        insort(self._running, seq, key=lambda other: other.order)
        request = seq.request
        step.opened.append(
            SlotOpen(
                slot=seq.slot,
                token_ids=list(seq.tokens),
                num_prompt_tokens=seq.num_prompt,
                params=request.params,
                seed=request.seed,
                positions=request.positions,
                position_delta=request.position_delta,
                bidirectional=request.bidirectional,
                stop_token_ids=request.stop_token_ids,
            )
        )

    def _preempt(self, step: Step, seq: Sequence) -> None:
        """Running to waiting, keeping nothing but tokens."""
        self._give_up_slot(seq)
        self._pool.release(seq.blocks)
        seq.reset()
        self._hold_without_slot(seq)
        self._num_preemptions += 1
        step.has_preempted = True

    def _give_up_slot(self, seq: Sequence) -> None:
        assert seq.slot is not None
        self._running.remove(seq)
        self._free_slots.append(seq.slot)
        seq.slot = None

    def _hold_without_slot(self, seq: Sequence) -> None:
        """To waiting: in line for a slot, with leases on the media still to be read."""
        heapq.heappush(self._waiting, seq.order)
        seq.lease_items(self._features)

    def _park_if_blocked(self, seq: Sequence) -> bool:
        """Waiting to parked, when its first features are missing: a slot would be wasted on the text before them."""
        missing = seq.missing_span(self._features, seq.num_tokens)
        if missing is None:
            return False
        if missing > seq.next_span and seq.chunk(self._features, self.limits.max_num_batched_tokens) > 0:
            return False
        order = heapq.heappop(self._waiting)
        assert order == seq.order
        seq.parked_on = seq.item_of(missing).key
        self._parked.setdefault(seq.parked_on, {})[order] = seq
        return True

    def _unpark(self, seq: Sequence) -> None:
        """Parked to waiting; whether it can start is looked at afresh."""
        if seq.parked_on is not None:
            others = self._parked[seq.parked_on]
            del others[seq.order]
            if not others:
                del self._parked[seq.parked_on]
            seq.parked_on = None
            heapq.heappush(self._waiting, seq.order)

    def _finish(
        self, seq: Sequence, reason: FinishReason, error: str | None = None, code: str | None = None
    ) -> RequestUpdate:
        seq.finished = True
        del self._alive[seq.order], self._by_id[seq.request.request_id]
        if seq.slot is not None:
            self._give_up_slot(seq)
        self._unpark(seq)
        self._pool.release(seq.blocks)
        for key in seq.leased:
            self._features.release(key, seq.order, ended=True)
        self._num_prompt_tokens += seq.num_prompt
        self._num_cached_tokens += seq.num_cached_tokens
        if self._on_finish is not None:
            self._on_finish(seq.request.request_id)
        return RequestUpdate(
            request_id=seq.request.request_id,
            finish_reason=reason,
            error=error,
            error_code=code,
            num_cached_tokens=seq.num_cached_tokens,
        )

    def _urgent_item(self) -> bytes | None:
        """The item that the head of the line misses first."""
        head = self._head()
        return head.missing_item(self._features) if head is not None else None

    # -------------------------------------------------------------------------------------- blocks

    def _reserve(self, step: Step, seq: Sequence, num_blocks: int) -> bool:
        """Make ``num_blocks`` allocatable for ``seq``, at the cost of those behind it.

        Leases on prefix hits go first. Running requests are preempted for running ones only; rows are planned in the
        line's order, so a victim has none in this step yet.
        """
        while self._pool.num_free < num_blocks:
            holder = self._last_block_lease()
            if holder is not None and (seq.slot is not None or holder.order > seq.order):
                self._give_lease_back(holder)
            elif seq.slot is not None and self._running[-1] is not seq:
                self._preempt(step, self._running[-1])
            else:
                return False
        return True

    def _last_block_lease(self) -> Sequence | None:
        while self._block_leases:
            priority, number = self._block_leases[0]
            seq = self._alive.get((-priority, -number))
            if seq is not None and seq.slot is None and seq.blocks:
                return seq
            heapq.heappop(self._block_leases)
        return None

    def _give_lease_back(self, seq: Sequence) -> None:
        self._pool.release(seq.blocks)
        seq.reset()
        seq.lease_items(self._features)
        self._unpark(seq)  # it may now lack an earlier item than the one it is parked on

    def _extend_hits(self, seq: Sequence) -> None:
        """Share blocks that others computed, from where ``seq`` stands, up to the first position that is read."""
        hasher, block_size = seq.hasher, self.limits.block_size
        if hasher is None or seq.num_computed != len(seq.blocks) * block_size:
            return
        held = len(seq.blocks)
        last = seq.num_shareable // block_size
        found: list[int] = []
        while held + len(found) < last:
            block = self._pool.find(hasher.digest(held + len(found)))
            if block is None:
                break
            found.append(block)
        end = held + len(found)
        while end > held and (cut := seq.cut(end * block_size)) < end * block_size:
            end = cut // block_size
        if end <= held:
            return
        for block in found[: end - held]:
            self._pool.share(block)
        seq.blocks += found[: end - held]
        seq.num_registered = end
        if seq.num_tokens == seq.num_prompt:  # hits of a restart after preemption are no saving
            seq.num_cached_tokens += (end - held) * block_size
        seq.advance(self._features, end * block_size)
        if seq.slot is None:
            heapq.heappush(self._block_leases, (-seq.order[0], -seq.order[1]))
            self._unpark(seq)  # the item it is parked on may be behind it now

    def _register(self, seq: Sequence) -> None:
        """Let others find the blocks that are full and whose tokens are known."""
        if seq.hasher is None:
            return
        num_full = min(seq.num_computed, len(seq.tokens)) // self.limits.block_size
        while seq.num_registered < num_full:
            self._pool.register(seq.blocks[seq.num_registered], seq.hasher.digest(seq.num_registered))
            seq.num_registered += 1
