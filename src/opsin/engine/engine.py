"""The engine as its callers see it: requests with their pictures in, updates out. Here, or in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from opsin.engine.histogram import Histogram
from opsin.processing.prompts import MediaSource
from opsin.runner.executor import MemoryPlan
from opsin.types import EngineRequest, ModelSpec, RequestUpdate


class EngineFacts(msgspec.Struct, frozen=True):
    """What is known of an engine once its model is loaded.

    Attributes:
        max_num_seqs: requests that run at once.
    """

    spec: ModelSpec
    max_model_len: int
    max_num_seqs: int
    memory: MemoryPlan
    device: str
    dtype: str


class Engine(Protocol):
    """Runs requests. One thread calls everything but ``wake``, ``stats`` and ``is_ready``, which any thread may.

    ``LocalEngine`` runs them in the caller's thread; ``RemoteEngine`` in a process that it watches.
    """

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def is_ready(self) -> bool:
        """Requests are taken now; False while an engine process is started again."""
        ...

    @property
    def has_work(self) -> bool:
        """``step`` wants to be called, even if nobody waits for an answer."""
        ...

    def add(self, requests: Sequence[EngineRequest], sources: Sequence[MediaSource]) -> None:
        """Queue the samples of one prompt, all or none.

        Args:
            sources: what the items of each request's ``media`` are made from.

        Raises:
            RequestError: they could never run here. A remote engine tells so by updates.
            EngineDeadError, EngineRestartError: the engine takes none, for good or for now.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request; no update tells of it. Unknown and finished ones are ignored."""
        ...

    def step(self) -> list[RequestUpdate]:
        """What is new. Waits a moment when nothing is.

        Raises:
            EngineDeadError: the engine failed; no request will be answered any more.
        """
        ...

    def wake(self) -> None:
        """End the wait inside ``step``, if there is one."""
        ...

    def stats(self) -> dict[str, float]:
        """Gauges and counters by name, as of now; counters end in ``_total``."""
        ...

    def histograms(self) -> dict[str, Histogram]:
        """What was observed since the engine was started, by name."""
        ...

    def close(self) -> None:
        """Stop, and free what is held."""
        ...
