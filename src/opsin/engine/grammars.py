"""Grammars compiled beside the steps, and beside the thread that listens to the front."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from opsin.engine.messages import Add
from opsin.engine.nice import be_nice
from opsin.errors import RequestError
from opsin.params import SamplingParams
from opsin.processing.grammar import GrammarCompiler

logger = logging.getLogger(__name__)

_NUM_THREADS = 2  # llguidance lets others run while it compiles; a grammar that takes its time holds up one of them

Order = tuple[Add, int | None]


class GrammarThreads:
    """Holds requests back until their grammars are compiled. One thread calls it.

    Args:
        pass_on: takes what was held, on one of the threads here; what is wrong with a grammar is found by the engine.
    """

    def __init__(self, compiler: GrammarCompiler, pass_on: Callable[[Order], None]) -> None:
        self._compiler = compiler
        self._pass_on = pass_on
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="opsin-grammar", initializer=be_nice)
        self._lock = threading.Lock()  # guards what follows
        self._held: dict[str, Add] = {}

    def take(self, order: Order) -> None:
        """Pass an order on: at once, or when what it needs is compiled."""
        add, _ = order
        params = add.requests[0].params
        form = params.structured_outputs if isinstance(params, SamplingParams) else None
        if form is None or self._compiler.is_known(form):
            self._pass_on(order)
            return
        with self._lock:
            self._held.update((request.request_id, add) for request in add.requests)

        def compile_it() -> None:
            try:
                self._compiler.compile(form)
            except RequestError:
                logger.debug("A grammar cannot be compiled.")
            self._release(order)

        self._threads.submit(compile_it)

    def abort(self, request_id: str) -> bool:
        """Forget a request that is held; False if it is not."""
        with self._lock:
            return self._held.pop(request_id, None) is not None

    def _release(self, order: Order) -> None:
        add, descriptor = order
        with self._lock:  # until it is passed on: an abort must not overtake its request
            wanted = [request for request in add.requests if self._held.get(request.request_id) is add]
            for request in wanted:
                del self._held[request.request_id]
            if wanted:
                self._pass_on((Add(wanted, add.sources), descriptor))
            elif descriptor is not None:
                os.close(descriptor)
