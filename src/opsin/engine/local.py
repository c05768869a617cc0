"""An engine in the caller's own thread: ``EngineCore`` and its media feeder, working as one."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from opsin.engine.core import EngineCore
from opsin.engine.engine import EngineFacts
from opsin.engine.feeder import MediaFeeder
from opsin.engine.histogram import Histogram
from opsin.engine.nice import SharedCores
from opsin.errors import EngineDeadError
from opsin.processing.grammar import GrammarCompiler
from opsin.processing.prompts import MediaSource
from opsin.types import EngineRequest, RequestUpdate

_STALL_WAIT_S = 0.2  # between looks at Ctrl-C while pictures are being decoded
_MAX_IDLE_STEPS = 3


class LocalEngine:
    """Implements ``Engine``.

    Args:
        news: set by whoever has something for this thread (the media pool, callers on other threads).
        grammars: the compiler of ``core``; any thread may have a grammar compiled before ``add`` needs it.
        cores: shared with those who decode and encode pictures; None where steps need none of them.
    """

    def __init__(
        self,
        core: EngineCore,
        feeder: MediaFeeder,
        facts: EngineFacts,
        news: threading.Event,
        grammars: GrammarCompiler,
        cores: SharedCores | None = None,
    ) -> None:
        self.core = core
        self.feeder = feeder
        self.facts = facts
        self.grammars = grammars
        self._news = news
        self._cores = cores
        self._num_idle_steps = 0

    @property
    def is_ready(self) -> bool:
        return self.core.is_alive

    @property
    def has_work(self) -> bool:
        return self.core.has_work

    def add(self, requests: Sequence[EngineRequest], sources: Sequence[MediaSource]) -> None:
        for i, request in enumerate(requests):
            self.feeder.hold(request, sources)
            try:
                self.core.add(request)
            except Exception:
                self.feeder.release(request.request_id)
                for earlier in requests[:i]:
                    self.core.abort(earlier.request_id)
                raise

    def abort(self, request_id: str) -> None:
        self.core.abort(request_id)
        self.feeder.tidy(self.core)  # now: if nobody is left, there may be no step for long

    def step(self) -> list[RequestUpdate]:
        """One step; waits a moment if pictures are being decoded and nothing else can be done."""
        self._news.clear()  # before looking, so that news in between is not slept through
        self.feeder.pump(self.core)
        if self._cores is not None:
            self._cores.share(self.feeder.takes_cores)
        updates = self.core.step()
        if not self.core.is_stalled or updates or not self.core.has_work:
            self._num_idle_steps = 0
        elif self.feeder.is_waiting:
            self._num_idle_steps = 0
            self._news.wait(_STALL_WAIT_S)
        else:  # a need may have come up in this very step; but the same again would go on for ever
            self._num_idle_steps += 1
            if self._num_idle_steps > _MAX_IDLE_STEPS:
                raise EngineDeadError("Requests are unfinished, but nothing can run and nothing is waited for.")
        return updates

    def wake(self) -> None:
        self._news.set()

    def stats(self) -> dict[str, float]:
        decoded = {
            "num_pictures_decoded_total": self.feeder.num_decoded,
            "num_pictures_decoded_on_device_total": self.feeder.num_decoded_on_device,
            "num_pixels_decoded_total": self.feeder.num_pixels_decoded,
            "num_pictures_decoding": self.feeder.num_decoding,
        }
        return {**self.core.stats(), **decoded}

    def histograms(self) -> dict[str, Histogram]:
        histograms = {**self.core.histograms, "decode_seconds": self.feeder.decode_seconds}
        if self.feeder.encode_seconds is not None:
            histograms["encode_step_seconds"] = self.feeder.encode_seconds
        return histograms

    def close(self) -> None:
        self.feeder.close()
        self.core.shutdown()
