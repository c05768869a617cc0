"""The engine as a process of its own: ``main`` loads a model and runs what the front at the other end asks for.

It ends when the front's end of the socket closes, so it does not outlive the process that started it.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec

from opsin.engine.build import build_engine
from opsin.engine.channel import EngineEnd
from opsin.engine.checkpoint import Checkpoint
from opsin.engine.grammars import GrammarThreads
from opsin.engine.heap import give_back
from opsin.engine.local import LocalEngine
from opsin.engine.messages import (
    Abort,
    Add,
    Beat,
    FromEngine,
    Load,
    Loaded,
    LoadFailed,
    News,
    ToEngine,
    unpack_sources,
)
from opsin.errors import EngineDeadError, OpsinError, RequestError
from opsin.types import OWN_FAULT, RequestUpdate

logger = logging.getLogger(__name__)

_BEAT_S = 0.2
_BEATS_PER_TIDYING = 50  # every ten seconds
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LAST_STEP_S = 2.0  # that a step may still take once the front is gone

_decoder = msgspec.msgpack.Decoder(ToEngine)
_encoder = msgspec.msgpack.Encoder()

_Order = tuple[Add | Abort, int | None]


def main(descriptor: int) -> int:
    """Serve one front until it is gone; returns the exit status.

    Args:
        descriptor: this end of the socket.
    """
    faulthandler.enable()  # a process that hangs is sent SIGABRT, and shows where each thread stands
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for ignored in (signal.SIGTERM, signal.SIGINT):  # the front decides when to stop
        signal.signal(ignored, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as connection:
        end = EngineEnd(connection)
        body, _ = end.receive()
        load = _decoder.decode(body)
        assert isinstance(load, Load)
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("opsin").setLevel(load.log_level)
        try:
            return _Service(end).run(load)
        except EOFError:  # the front went away in the middle of what it was told
            return 0


class _Service:
    """One engine and its three threads: this one steps, one listens, one tells that the process is alive."""

    def __init__(self, end: EngineEnd) -> None:
        self._end = end
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._engine: LocalEngine | None = None
        self._step_begun_s: float | None = None

    def run(self, load: Load) -> int:
        threading.Thread(target=self._beat, name="opsin-beat", daemon=True).start()
        try:
            engine = build_engine(load.config, Checkpoint.open(load.config), encodes_beside=True, serves=True)
        except OpsinError as error:
            self._send(LoadFailed(type(error).__name__, str(error)))
            return 1
        except Exception as error:
            logger.exception("The model could not be loaded.")
            self._send(LoadFailed("EngineDeadError", f"The model could not be loaded: {type(error).__name__}: {error}"))
            return 1
        self._engine = engine
        gc.collect()
        gc.freeze()  # what a model and its libraries leave stays; a full collection would hold up every answer for it
        threading.Thread(target=self._listen, args=(engine,), name="opsin-listen", daemon=True).start()
        self._send(Loaded(engine.facts))
        try:
            while self._carry_out_orders(engine, wait=not engine.has_work):
                if engine.has_work:
                    self._step(engine)
        except EngineDeadError:  # logged where it arose; nothing on the device is to be trusted any more
            os._exit(1)
        engine.close()
        return 0

    def _step(self, engine: LocalEngine) -> None:
        self._step_begun_s = time.monotonic()
        updates = engine.step()
        self._step_begun_s = None
        if updates:
            self._send(News(updates))

    def _carry_out_orders(self, engine: LocalEngine, wait: bool) -> bool:
        """Do everything that was asked for, waiting for the first if ``wait``; False when the front is gone."""
        try:
            order = self._orders.get(block=wait)
            while order is not None:
                self._carry_out(engine, *order)
                order = self._orders.get_nowait()
        except queue.Empty:
            return True
        return False

    def _carry_out(self, engine: LocalEngine, order: Add | Abort, descriptor: int | None) -> None:
        if isinstance(order, Abort):
            engine.abort(order.request_id)
            return
        try:
            engine.add(order.requests, unpack_sources(order.sources, descriptor))
        except RequestError as error:
            code = error.code or OWN_FAULT
            refused = [
                RequestUpdate(request_id=r.request_id, finish_reason="error", error=str(error), error_code=code)
                for r in order.requests
            ]
            self._send(News(refused))

    def _listen(self, engine: LocalEngine) -> None:
        grammars = GrammarThreads(engine.grammars, lambda order: self._order(engine, order))
        try:
            while True:
                body, descriptor = self._end.receive()
                order = _decoder.decode(body)
                assert not isinstance(order, Load)
                if isinstance(order, Add):
                    grammars.take((order, descriptor))
                elif not grammars.abort(order.request_id):
                    self._order(engine, (order, None))
        except EOFError:
            self._order(engine, None)
            _leave()
        except Exception:  # our own bug; but a process that listens no more would be taken for a healthy one
            logger.exception("The engine process does not understand its front.")
            os._exit(1)

    def _order(self, engine: LocalEngine, order: _Order | None) -> None:
        self._orders.put(order)
        engine.wake()

    def _beat(self) -> None:
        try:
            for number in itertools.count(1):
                engine = self._engine
                stats, histograms = ({}, {}) if engine is None else (_stats(engine), engine.histograms())
                self._send(Beat(self._step_begun_s, stats, histograms))
                if number % _BEATS_PER_TIDYING == 0:
                    give_back()
                time.sleep(_BEAT_S)
        except EOFError:
            _leave()

    def _send(self, message: FromEngine) -> None:
        self._end.send(_encoder.encode(message))


def _stats(engine: LocalEngine) -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {**engine.stats(), "engine_resident_bytes": pages * _PAGE_BYTES}


def _leave() -> None:
    """The front is gone: end the process, whatever its other threads are at."""
    time.sleep(_LAST_STEP_S)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
