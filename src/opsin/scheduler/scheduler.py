"""The scheduler: which requests run in the next step, how many tokens of each, and where their keys and values go.

Requests stand in one line, by (priority,) arrival. The head of the line is the oldest unfinished request, and one
rule makes the whole thing live: *the head can always advance*. It may take a slot, KV blocks, feature bytes and
payload budget from those behind it, last in line first, and it has the first pick of the token budget. Everybody else
gets what is left, in order. As the head finishes after a bounded number of steps, so does everybody. Nobody else is let
in where those that run would soon need the room: prompts are dear, and one that is preempted is computed twice.

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

from collections import deque
from collections.abc import Callable

from opsin.cache.blocks import BlockPool
from opsin.cache.features import FeatureCache
from opsin.errors import RequestError
from opsin.scheduler.admission import check_fits
from opsin.scheduler.limits import SchedulerLimits
from opsin.scheduler.line import Line
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
    StepPlan,
    StepResult,
)

_GROWTH = 64
"""Tokens by which requests that run may grow before another is let in beside them."""


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
            limits.feature_bytes,
            limits.feature_row_bytes,
            limits.pixel_bytes,
            as_features=limits.encodes_beside,
            max_raw_pixels=limits.max_raw_pixels,
        )
        self._line = Line(limits.max_num_seqs)
        self._num_added = 0
        self._num_steps = 0
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
        seq = Sequence(request, (priority, self._num_added), self.limits, self._pool, grammar)
        if self._line.find(request.request_id) is not None:
            raise RequestError(f"Request id {request.request_id!r} is in use; ids of unfinished requests must differ.")
        check_fits(seq, self.limits)
        self._num_added += 1
        self._line.add(seq)
        self._extend_hits(seq)
        seq.lease_items(self._features)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request at any moment; None when there is no such request (any more)."""
        seq = self._line.find(request_id)
        return self._finish(seq, "abort") if seq is not None else None

    def fail_all(self, message: str, code: str | None = None) -> list[RequestUpdate]:
        """End every request with an error."""
        return [self._finish(seq, "error", message, code) for seq in self._line]

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
        holders = [self._line[order] for order in self._features.payload_failed(key)]
        updates = [self._finish(seq, "error", message, code) for seq in holders]
        for seq, update in zip(holders, updates, strict=True):
            update.failed_item = next((i for i, item in enumerate(seq.request.media) if item.key == key), None)
        return updates

    # ---------------------------------------------------------------------------------------- plan

    def plan(self, now_s: float = 0.0) -> StepPlan | None:
        """Decide the next step; None when nothing can run before a commit, a payload or a request comes in."""
        if len(self._in_flight) >= self.limits.pipeline_depth:
            return None
        head = self._line.head()
        if head is not None:
            self._extend_hits(head)  # may end leases on features, which makes room for the item it misses
        max_tokens, max_patches = self.limits.step_budget(any(seq.is_decoding for seq in self._line.running))
        # Encoding comes before rows: it may evict features, which no row of this step may then use.
        encode = self._features.encode(max_patches, self._urgent_item())
        for item in encode:
            self._line.unpark_all(item.key)
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
        if self._line.next_waiting() is not head or head.in_flight:
            return
        if self._park_if_blocked(head):
            head.blocks.name(head.num_prompt)  # now, while its pictures are on their way
            return
        if not self._line.num_free_slots:
            self._preempt(step, self._line.running[-1])
        self._open(step, head)

    def _plan_running(self, step: Step, head: Sequence | None) -> None:
        # One token per decoding request is set aside, so that prefills do not stall answers. The head is exempt: a
        # bidirectional range may need the whole budget, which it would otherwise wait for without bound.
        running = [(seq, seq.is_decoding) for seq in self._line.running]
        num_reserved = sum([is_decoding for _, is_decoding in running])
        for seq, is_decoding in running:
            if seq.slot is None:  # preempted in this step
                continue
            budget = step.num_tokens_left
            if is_decoding:
                num_reserved -= 1
                num_tokens = 1
            elif seq.is_runnable:
                self._extend_hits(seq)
                num_tokens = step.chunk(seq, self._features, budget if seq is head else budget - num_reserved)
            else:  # its last token is in flight
                continue
            if 0 < num_tokens <= budget:
                num_blocks = seq.blocks.num_missing(seq.num_computed + num_tokens)
                if num_blocks <= 0 or self._reserve(step, seq, num_blocks):
                    self._add_row(step, seq, num_tokens, num_blocks)

    def _plan_waiting(self, step: Step) -> None:
        while self._line.num_free_slots and not step.is_full and not step.has_preempted:
            seq = self._line.next_waiting()
            if seq is None or seq.in_flight:  # a preempted request waits for its last token
                return
            self._extend_hits(seq)
            if self._park_if_blocked(seq):
                continue
            num_tokens = step.chunk(seq, self._features, step.num_tokens_left)
            # Room for all its tokens, not for this chunk alone: else it would soon be preempted again.
            num_blocks = seq.blocks.num_missing(seq.num_tokens)
            if num_tokens <= 0 or not self._reserve(step, seq, num_blocks + self._room_to_grow(seq, num_blocks)):
                return
            self._open(step, seq)
            self._add_row(step, seq, num_tokens, seq.blocks.num_missing(seq.num_computed + num_tokens))

    def _add_row(self, step: Step, seq: Sequence, num_tokens: int, num_blocks: int) -> None:
        assert seq.slot is not None
        start = seq.num_computed
        if num_blocks > 0:
            seq.blocks.grow(num_blocks)
        new_blocks = seq.blocks.take_unsent()
        emits = start + num_tokens == seq.num_tokens
        mask = seq.grammar.mask if emits and seq.grammar is not None else None
        if start >= seq.num_prompt:
            seq.num_computed += num_tokens
            row = RowPlan(seq.slot, start, num_tokens, new_blocks, emits, (), mask)
        else:
            uses = seq.feature_uses(num_tokens, self._features)
            row = RowPlan(seq.slot, start, num_tokens, new_blocks, emits, uses, mask)
            seq.advance(self._features, start + num_tokens)
            seq.publish_blocks()
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
            if row_result.error is not None:
                seq.blocks.forget()
            if seq.finished:  # a zombie: it ended while this step was in flight
                continue
            if row_result.error is not None:
                updates.append(self._finish(seq, "error", row_result.error))
                continue
            if seq.prompt_logprobs is not None and row_result.prompt_logprobs is not None:
                begin = row.start + 1
                entries = row_result.prompt_logprobs[: seq.num_prompt - begin]
                seq.prompt_logprobs[begin : begin + len(entries)] = entries
            if row_result.values is not None:
                seq.values.update(row_result.values)
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
        seq.publish_blocks()
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
        return bool(self._line or self._in_flight or self._features.has_drops)

    @property
    def num_free_slots(self) -> int:
        return self._line.num_free_slots

    def stats(self) -> list[tuple[str, float]]:
        """Gauges and counters by name; counters end in ``_total``."""
        num_blocks_used = self._pool.num_usable - self._pool.num_free
        return [
            ("num_requests_running", len(self._line.running)),
            ("num_requests_waiting", len(self._line) - len(self._line.running)),
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

    def _open(self, step: Step, seq: Sequence) -> None:
        """Let the first that waits run."""
        assert len(seq.tokens) == seq.num_tokens, "all tokens of a request that starts over are known"
        self._line.start(seq)
        seq.scheduled_s = seq.scheduled_s or step.now_s
        step.open(seq)

    def _preempt(self, step: Step, seq: Sequence) -> None:
        """Running to waiting, keeping nothing but tokens."""
        self._line.stop(seq)
        seq.start_over(self._features)
        self._num_preemptions += 1
        step.has_preempted = True

    def _park_if_blocked(self, seq: Sequence) -> bool:
        """Waiting to parked, when its first features are missing: a slot would be wasted on the text before them."""
        missing = seq.missing_span(self._features, seq.num_tokens)
        if missing is None:
            return False
        if missing > seq.next_span and seq.chunk(self._features, self.limits.max_num_batched_tokens) > 0:
            return False
        self._line.park(seq, seq.item_of(missing).key)
        return True

    def _finish(
        self, seq: Sequence, reason: FinishReason, error: str | None = None, code: str | None = None
    ) -> RequestUpdate:
        seq.finished = True
        self._line.remove(seq)
        seq.blocks.release()
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
        head = self._line.head()
        return head.missing_item(self._features) if head is not None else None

    # -------------------------------------------------------------------------------------- blocks

    def _room_to_grow(self, seq: Sequence, num_blocks: int) -> int:
        """Blocks that those that run will fill within their next tokens, or beside ``num_blocks`` are free anyway.

        Those less urgent than ``seq`` do not count: it is for them to make room.
        """
        running = self._line.running
        most = len(running) * (-(-_GROWTH // self.limits.block_size) + 1)
        if self._pool.num_free >= num_blocks + most:
            return most
        priority, _ = seq.order
        urgent = [other for other in running if other.order[0] <= priority]
        return sum([max(0, one.blocks.num_missing(min(one.num_tokens + _GROWTH, one.limit))) for one in urgent])

    def _reserve(self, step: Step, seq: Sequence, num_blocks: int) -> bool:
        """Make ``num_blocks`` allocatable for ``seq``, at the cost of those behind it.

        Leases on prefix hits go first. Running requests are preempted for running ones only; rows are planned in the
        line's order, so a victim has none in this step yet.
        """
        if seq.slot is None and self._pool.num_free < num_blocks:  # leases are not to be given up for nothing
            if self._pool.num_free + self._line.num_blocks_held_behind(seq) < num_blocks:
                return False
        while self._pool.num_free < num_blocks:
            holder = self._line.last_block_holder()
            if holder is not None and (seq.slot is not None or holder.order > seq.order):
                self._give_lease_back(holder)
            elif seq.slot is not None and self._line.running[-1] is not seq:
                self._preempt(step, self._line.running[-1])
            else:
                return False
        return True

    def _give_lease_back(self, seq: Sequence) -> None:
        seq.start_over(self._features)
        self._line.unpark(seq)  # it may now lack an earlier item than the one it is parked on

    def _extend_hits(self, seq: Sequence) -> None:
        """Share blocks that others computed, from where ``seq`` stands, up to the first position that is read."""
        held = seq.num_computed
        end = seq.blocks.share(held, seq.num_shareable, seq.cut)
        if end == held:
            return
        if seq.num_tokens == seq.num_prompt:  # hits of a restart after preemption are no saving
            seq.num_cached_tokens += end - held
        seq.advance(self._features, end)
        if seq.slot is None:
            self._line.add_block_holder(seq)
            self._line.unpark(seq)  # the item it is parked on may be behind it now
