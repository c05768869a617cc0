"""The engine: requests in, steps run, updates out. READ THIS FIRST.

    add ─► scheduler ─► plan ─► executor.launch ─► commit ─► updates
              ▲                                       │
              └──────────── request state ◄───────────┘

A step is three acts. ``plan`` decides, without torch, what runs: slots and counts, never sampled values. ``launch``
starts it on the device and does not wait. ``commit`` puts the results into request state. With a pipeline two deep,
commit(n) comes after launch(n + 1), so the device never waits for Python.

Pictures: ``take_needs`` says which items the engine wants pixels of; whoever drives the engine has them decoded and
hands them in with ``put_payload`` (or ``fail_media``). The engine alone owns the caches; a picture whose features or
prompt prefix are cached is never asked for.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import NamedTuple

from opsin.engine.histogram import SHORT_SECONDS, TOKENS, Histogram
from opsin.errors import EngineDeadError, RequestError
from opsin.params import SamplingParams
from opsin.processing.grammar import GrammarCompiler
from opsin.runner.executor import Executor, Payload, PendingStep
from opsin.scheduler import Scheduler
from opsin.scheduler.sequence import Grammar
from opsin.types import EngineRequest, MediaNeed, RequestUpdate, StepPlan

logger = logging.getLogger(__name__)


class _Flight(NamedTuple):
    plan: StepPlan
    pending: PendingStep
    begun_s: float


class EngineCore:
    """Single-threaded: whoever owns it calls everything from one thread.

    Args:
        grammars: compiles what ``structured_outputs`` ask for.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        pipeline_depth: int,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.executor = executor
        self._grammars = grammars
        self._scheduler = scheduler
        self._depth = pipeline_depth
        self._in_flight: deque[_Flight] = deque()
        self._updates: list[RequestUpdate] = []
        self._dead: BaseException | None = None
        self._num_items = self._num_needs = 0
        self.histograms = {
            "iteration_tokens": Histogram.of(TOKENS),
            "step_seconds": Histogram.of(SHORT_SECONDS),
            "encode_step_seconds": Histogram.of(SHORT_SECONDS),
        }
        self.is_stalled = False
        """The last ``step`` found nothing to run and nothing to commit."""

    # ------------------------------------------------------------------------------------ requests

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never run here.
            EngineDeadError: the engine has stopped.
        """
        self._require_alive()
        self._scheduler.add(request, self._grammar(request))
        self._num_items += len(request.media)

    def _grammar(self, request: EngineRequest) -> Grammar | None:
        params = request.params
        if not isinstance(params, SamplingParams) or params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise RequestError("This engine takes no structured_outputs.", param="structured_outputs")
        return self._grammars.compile(params.structured_outputs)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown and finished ones are ignored.

        No update tells of it: whoever aborts knows, and the next request may already have taken the same id.
        """
        self._scheduler.abort(request_id)

    # --------------------------------------------------------------------------------------- media

    def take_needs(self) -> list[MediaNeed]:
        """Items whose payload the engine wants, in the order in which it wants them; each is asked for once."""
        needs = self._scheduler.take_needs()
        self._num_needs += len(needs)
        return needs

    def wants(self, key: bytes) -> bool:
        """Somebody still waits for this item's payload."""
        return self._scheduler.wants(key)

    def put_payload(self, key: bytes, payload: Payload) -> None:
        """Answer a need. Payloads nobody waits for any more are ignored."""
        if self._scheduler.wants(key):
            self.executor.put_payload(key, payload)
            self._scheduler.media_ready(key)

    def fail_media(self, key: bytes, message: str, code: str | None) -> None:
        """A need cannot be met: the requests that show this item fail, and no others."""
        self._updates += self._scheduler.media_failed(key, message, code)

    # --------------------------------------------------------------------------------------- steps

    @property
    def is_alive(self) -> bool:
        """No step has failed, and it was not shut down."""
        return self._dead is None

    @property
    def has_work(self) -> bool:
        """Requests are unfinished, or updates wait to be fetched."""
        return bool(self._updates) or bool(self._in_flight) or self._scheduler.has_work

    def step(self) -> list[RequestUpdate]:
        """Plan and launch one step if anything can run, and commit the oldest one that is due.

        Returns at once, and leaves ``is_stalled`` set, while everything waits for media.

        Raises:
            EngineDeadError: the device or a kernel failed; every request has been failed.
        """
        self._require_alive()
        try:
            now_s = time.monotonic()
            plan = self._scheduler.plan(now_s)
            self.is_stalled = plan is None and not self._in_flight
            if plan is not None:
                self._in_flight.append(_Flight(plan, self.executor.launch(plan), now_s))
            if self._in_flight and (plan is None or len(self._in_flight) >= self._depth):
                oldest = self._in_flight.popleft()
                self._updates += self._scheduler.commit(oldest.plan, oldest.pending.result())
                self._observe(oldest)
        except Exception as error:
            # Requests are validated before they get here, so this is a bug or a broken device: nothing on it is
            # to be trusted any more.
            logger.exception("The engine failed in a step and has stopped.")
            self._dead = error
            self._in_flight.clear()
            raise EngineDeadError(f"The engine failed in a step and has stopped: {error}") from error
        updates, self._updates = self._updates, []
        return updates

    def shutdown(self) -> None:
        """Drop what is in flight and free the device's memory."""
        self._in_flight.clear()
        self._dead = self._dead or RuntimeError("shut down")
        self.executor.shutdown()

    def stats(self) -> dict[str, float]:
        """Gauges and counters by name, as of now; counters end in ``_total``."""
        media = {"mm_cache_queries_total": self._num_items, "mm_cache_misses_total": self._num_needs}
        return {**dict(self._scheduler.stats()), **media}

    def _observe(self, flight: _Flight) -> None:
        seconds = time.monotonic() - flight.begun_s
        self.histograms["step_seconds"].observe(seconds)
        if flight.plan.encode:
            self.histograms["encode_step_seconds"].observe(seconds)
        if flight.plan.rows:
            self.histograms["iteration_tokens"].observe(flight.plan.num_tokens)

    def _require_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"The engine has stopped: {self._dead}. Make a new one.") from self._dead
