"""An engine in a process of its own, seen from the front: started, listened to, watched, and started again."""

from __future__ import annotations

import enum
import logging
import os
import select
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

import opsin.errors
from opsin.config import EngineConfig
from opsin.engine.channel import FrontEnd
from opsin.engine.child import ChildProcess
from opsin.engine.engine import EngineFacts
from opsin.engine.histogram import Histogram
from opsin.engine.messages import Abort, Add, Beat, FromEngine, Load, Loaded, LoadFailed, News, ToEngine, pack_sources
from opsin.errors import EngineDeadError, EngineRestartError
from opsin.processing.output import ENGINE_RESTARTED
from opsin.processing.prompts import MediaSource
from opsin.types import EngineRequest, RequestUpdate

logger = logging.getLogger(__name__)

_LOOK_S = 0.2  # between two looks at a process that says nothing
_END_LOOK_S = 0.02
_QUIET_S = 0.7  # several beats have not come; with one look, less than a second
_DUMP_S = 1.0  # for a process that hangs to write down where it stands
_CLOSE_S = 5.0

_decoder = msgspec.msgpack.Decoder(FromEngine)
_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """When an engine process is given up, in seconds.

    Attributes:
        silence_s: it says nothing for so long.
        step_s: one step takes longer.
        max_deaths: it is not started again after so many ends within ``deaths_s``.
    """

    silence_s: float = 10.0
    step_s: float = 300.0
    max_deaths: int = 3
    deaths_s: float = 600.0


class _State(enum.Enum):
    LOADING = enum.auto()
    RUNNING = enum.auto()
    ENDING = enum.auto()
    """Told to write down where it stands; killed soon."""
    CLOSED = enum.auto()


class RemoteEngine:
    """Implements ``Engine``; ``wait_until_loaded`` comes first.

    When the process ends or hangs, every request that it had ends with an update of code ``ENGINE_RESTARTED``, and it
    is started again. Nothing of the old process is kept but the counters' names: the caches are the engine's alone.

    Args:
        child: the first process, where it was started already.

    Raises:
        EngineDeadError: from ``step``: it ended too often.
    """

    def __init__(self, config: EngineConfig, watch: Watch, child: ChildProcess | None = None) -> None:
        self._config = config
        self._watch = watch
        self._facts: EngineFacts | None = None
        self._stats: dict[str, float] = {}
        self._histograms: dict[str, Histogram] = {}
        self._running: set[str] = set()
        self._failed: list[RequestUpdate] = []
        self._deaths: deque[float] = deque()
        self._num_restarts = 0
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._news, selectors.EVENT_READ)
        self._start(child or ChildProcess())

    # --------------------------------------------------------------------------------------- as an Engine

    @property
    def facts(self) -> EngineFacts:
        assert self._facts is not None, "wait_until_loaded() was not called"
        return self._facts

    @property
    def is_ready(self) -> bool:
        return self._state is _State.RUNNING and time.monotonic() - self._heard_s < _QUIET_S

    @property
    def has_work(self) -> bool:
        return self._state is not _State.CLOSED  # somebody has to listen, and to watch

    @property
    def pid(self) -> int:
        """The process that runs now, or ran last."""
        return self._process.pid

    def add(self, requests: Sequence[EngineRequest], sources: Sequence[MediaSource]) -> None:
        if self._state is not _State.RUNNING:
            raise EngineRestartError("The engine is being started again.")
        heads, descriptor = pack_sources(sources)
        try:
            body = _encoder.encode(Add(list(requests), heads))
        except BaseException:  # our own bug, but no reason to lose memory by it
            if descriptor is not None:
                os.close(descriptor)
            raise
        self._running.update(request.request_id for request in requests)
        self._send(body, descriptor)

    def abort(self, request_id: str) -> None:
        if request_id in self._running:
            self._running.discard(request_id)
            self._tell(Abort(request_id))

    def step(self) -> list[RequestUpdate]:
        """What the process has told, after a moment's wait if there is nothing; and a look at how it is."""
        if self._state is _State.ENDING:
            self._bury()
        else:
            self._listen(_LOOK_S)
        updates, self._failed = self._failed, []
        return updates

    def wake(self) -> None:
        try:
            os.eventfd_write(self._news, 1)
        except (OSError, ValueError):  # closed
            return

    def stats(self) -> dict[str, float]:
        return {**self._stats, "num_engine_restarts_total": self._num_restarts}

    def histograms(self) -> dict[str, Histogram]:
        return self._histograms

    def close(self) -> None:
        if self._state is _State.CLOSED:
            return
        was_running = self._state is _State.RUNNING
        self._disconnect()  # which tells it to end
        if was_running:
            try:
                self._process.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                logger.warning("The engine process does not end; it is killed.")
        self._kill()
        self._state = _State.CLOSED
        self._selector.close()
        news, self._news = self._news, -1
        os.close(news)

    # ----------------------------------------------------------------------------------------------- start

    def wait_until_loaded(self, is_unwanted: threading.Event) -> None:
        """Wait for the first process.

        Raises:
            ConfigError, UnsupportedModelError, WeightError: what the process says of its model.
            EngineDeadError: it ended without a word, or is unwanted.
        """
        while self._state is _State.LOADING:
            if is_unwanted.is_set():
                raise EngineDeadError("The engine was given up while it loaded the model.")
            self._listen(_LOOK_S)

    def _start(self, child: ChildProcess) -> None:
        self._process = child.process
        self._end = FrontEnd(child.connection)
        self._selector.register(self._end, selectors.EVENT_READ)
        self._state = _State.LOADING
        self._heard_s = self._looked_s = time.monotonic()
        self._has_spoken = False  # importing torch takes its time, and nothing can be said before
        self._step_begun_s: float | None = None
        self._tell(Load(self._config, logging.getLogger("opsin").getEffectiveLevel()))

    # ---------------------------------------------------------------------------------------------- listen

    def _listen(self, timeout_s: float) -> None:
        try:
            self._listen_for(selectors.EVENT_READ | (selectors.EVENT_WRITE if self._end.wants_to_write else 0))
            for key, ready in self._selector.select(timeout_s):
                if key.fileobj is not self._end:
                    os.eventfd_read(self._news)
                    continue
                if ready & selectors.EVENT_WRITE:
                    self._end.flush()
                if ready & selectors.EVENT_READ:
                    for body in self._end.receive():
                        self._take(_decoder.decode(body))
        except (EOFError, msgspec.MsgspecError, RecursionError):  # the last of what is nested without end
            self._end_process(f"ended ({_how(self._process)})")
        else:
            self._look()

    def _listen_for(self, events: int) -> None:
        if self._selector.get_key(self._end).events != events:
            self._selector.modify(self._end, events)

    def _take(self, message: FromEngine) -> None:
        self._heard_s = time.monotonic()
        self._has_spoken = True
        match message:
            case News(updates):
                for update in updates:
                    if update.finish_reason is not None or update.error is not None:
                        self._running.discard(update.request_id)
                self._failed += updates
            case Beat(step_begun_s, stats, histograms):
                self._step_begun_s = step_begun_s
                self._stats, self._histograms = stats, histograms
            case Loaded(facts):
                self._facts = facts
                self._state = _State.RUNNING
                if self._num_restarts:
                    logger.warning("The engine process runs again.")
            case LoadFailed(error, text):
                kind = getattr(opsin.errors, error, EngineDeadError)
                if self._facts is None:
                    raise kind(text)
                logger.error("The engine process could not load the model again: %s", text)

    def _tell(self, message: ToEngine) -> None:
        self._send(_encoder.encode(message))

    def _send(self, body: bytes, descriptor: int | None = None) -> None:
        try:
            self._end.send(body, descriptor)
        except EOFError:  # the next look finds it dead, and tells everybody
            logger.debug("The engine process is gone.")

    # ----------------------------------------------------------------------------------------------- watch

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_s > 2 * _LOOK_S + _QUIET_S:  # it was this process that stood still
            self._heard_s = now
        self._looked_s = now
        silence_s = now - self._heard_s
        step_s = now - self._step_begun_s if self._step_begun_s is not None else 0.0
        if self._has_spoken and silence_s > self._watch.silence_s:
            self._end_process(f"has been silent for {silence_s:.1f} s")
        elif step_s > self._watch.step_s:
            self._end_process(f"has been at one step for {step_s:.1f} s")

    def _end_process(self, what: str) -> None:
        """Tell everybody who waits, and see to it that the process is gone."""
        if self._facts is None:
            raise EngineDeadError(f"The engine process {what} while it loaded the model.{_hint(self._process)}")
        logger.error("The engine process %s; %d requests end with it.", what, len(self._running))
        message = "The engine stopped under this request, and is being started again."
        self._failed += [
            RequestUpdate(request_id=i, finish_reason="error", error=message, error_code=ENGINE_RESTARTED)
            for i in self._running
        ]
        self._running.clear()
        self._stats = {}
        self._disconnect()
        self._state = _State.ENDING
        self._kill_s = time.monotonic() + _DUMP_S
        if self._process.poll() is None:
            for number in (signal.SIGABRT, signal.SIGCONT):  # its stacks, on stderr, even if it was stopped
                self._process.send_signal(number)

    def _bury(self) -> None:
        """Start another process as soon as this one is gone.

        Raises:
            EngineDeadError: it died too often.
        """
        if self._process.poll() is None and time.monotonic() < self._kill_s:
            select.select([self._news], [], [], _END_LOOK_S)
            return
        self._kill()
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - self._watch.deaths_s:
            self._deaths.popleft()
        if len(self._deaths) >= self._watch.max_deaths:
            raise EngineDeadError(
                f"The engine process ended {len(self._deaths)} times within {self._watch.deaths_s:g} s, the last time "
                f"with {_how(self._process)}; it is not started again. The log has the reasons.{_hint(self._process)}"
            )
        self._num_restarts += 1
        self._start(ChildProcess())

    def _disconnect(self) -> None:
        if self._state in (_State.LOADING, _State.RUNNING):
            self._selector.unregister(self._end)
            self._end.close()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _how(process: subprocess.Popen[bytes]) -> str:
    """How a process ended, or that it did not."""
    try:
        status = process.wait(0.5)  # its socket closes a moment before
    except subprocess.TimeoutExpired:
        return "what it says is not understood"
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _hint(process: subprocess.Popen[bytes]) -> str:
    if process.poll() == -signal.SIGKILL:
        return " Linux kills processes when memory runs out: dmesg tells."
    return ""
