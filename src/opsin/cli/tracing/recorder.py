"""Spans of time by lane (a thread, a media worker, the device), and their form for Perfetto and chrome://tracing."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

DEVICE = "device"
MEDIA = "media"
"""The lanes of workers begin with this."""


class Span(NamedTuple):
    """What a lane did from ``begin_s`` to ``end_s``, by the machine's monotonic clock.

    Attributes:
        facts: numbers that go with it: tokens of a step, pixels of a picture.
    """

    lane: str
    stage: str
    begin_s: float
    end_s: float
    facts: Mapping[str, float] = {}

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


class RequestTimes(NamedTuple):
    """When one request passed each point, by the machine's monotonic clock.

    Attributes:
        begin_s: its template or its pictures' headers began to be read.
        read_s: its pictures were open.
        processed_s: its tokens were known.
        pixels_s: the last of its pictures was decoded; ``processed_s`` without any, or if none was asked for.
        first_s, last_s: its first and last token were there.
    """

    request_id: str
    begin_s: float
    read_s: float
    processed_s: float
    pixels_s: float
    first_s: float
    last_s: float


class DeviceClock(Protocol):
    """Marks points in the device's work, and says afterwards when each was reached."""

    @property
    def is_host(self) -> bool:
        """A call's work is done when it returns."""
        ...

    def mark(self) -> Any:
        """A point behind everything launched so far; None where none can be set."""
        ...

    def seconds(self, mark: Any) -> float:
        """When it was reached, by the machine's monotonic clock. Called once all work is done."""
        ...


class HostClock:
    """The clock of a CPU."""

    is_host = True

    def mark(self) -> float:
        return time.monotonic()

    def seconds(self, mark: float) -> float:
        return mark


class CudaClock:
    """CUDA events, which cost the host microseconds and the device nothing. Set against the host's clock once."""

    is_host = False

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._cuda.synchronize()
        self._begin: torch.cuda.Event = self.mark()
        self._begin.synchronize()
        self._begin_s = time.monotonic()

    def mark(self) -> Any:
        if self._cuda.is_current_stream_capturing():  # what is recorded into a graph happens when it is replayed
            return None
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        mark.synchronize()
        return self._begin_s + self._begin.elapsed_time(mark) / 1e3


class Recorder:
    """Collects spans from any thread.

    Args:
        clock: the device's.
    """

    def __init__(self, clock: DeviceClock) -> None:
        self.begin_s = self.end_s = time.monotonic()
        self.requests: list[RequestTimes] = []
        self._clock = clock
        self._spans: list[Span] = []
        self._marked: list[tuple[str, Any, Any, float, Mapping[str, float]]] = []

    @property
    def spans(self) -> Sequence[Span]:
        """In the order in which they ended; the device's once ``finish`` was called."""
        return self._spans

    def add(self, span: Span) -> None:
        self._spans.append(span)

    @contextlib.contextmanager
    def span(self, stage: str, facts: Mapping[str, float] = {}) -> Iterator[None]:
        """Record what the calling thread does inside."""
        begin_s = time.monotonic()
        try:
            yield
        finally:
            self._spans.append(Span(threading.current_thread().name, stage, begin_s, time.monotonic(), facts))

    @contextlib.contextmanager
    def device_span(self, stage: str, facts: Mapping[str, float] = {}) -> Iterator[None]:
        """Record what the device does of all that is launched inside, and the launching itself."""
        begin = self._clock.mark()
        with self.span(stage, facts):
            yield
        end = self._clock.mark()
        if begin is not None and end is not None:
            self._marked.append((stage, begin, end, time.monotonic(), facts))

    def finish(self) -> None:
        """Note the end, and wait for the device's spans.

        A GPU's have a further fact: ``behind_ms``, how much longer than the host, which launched it, the device took.
        """
        self.end_s = time.monotonic()
        for stage, begin, end, launched_s, facts in self._marked:
            begin_s, end_s = self._clock.seconds(begin), self._clock.seconds(end)
            behind = {} if self._clock.is_host else {"behind_ms": round(1e3 * max(0.0, end_s - launched_s), 3)}
            self._spans.append(Span(DEVICE, stage, begin_s, end_s, {**facts, **behind}))
        self._marked.clear()

    def write(self, path: Path) -> None:
        """Write the spans as a Chrome trace: one process for the host's threads, one for media, one for the device."""
        path.write_text(json.dumps({"traceEvents": self._events(), "displayTimeUnit": "ms"}), encoding="utf-8")

    def _events(self) -> list[dict[str, Any]]:
        processes = {"host": 1, MEDIA: 2, DEVICE: 3}
        places: dict[str, dict[str, int]] = {}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for name, pid in processes.items()
        ]
        for span in self._spans:
            place = places.get(span.lane)
            if place is None:
                kind = next((name for name in (MEDIA, DEVICE) if span.lane.startswith(name)), "host")
                place = places[span.lane] = {"pid": processes[kind], "tid": len(places) + 1}
                events.append({"ph": "M", "name": "thread_name", **place, "args": {"name": span.lane}})
            times_us = {"ts": 1e6 * (span.begin_s - self.begin_s), "dur": 1e6 * span.seconds}
            rounded = {name: round(value, 3) for name, value in times_us.items()}
            events.append({"ph": "X", "name": span.stage, **place, **rounded, "args": dict(span.facts)})
        return events
