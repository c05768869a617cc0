"""A ``Front`` on a thread of its own: calls post work to it, and outputs go back to the event loop that asked."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from itertools import chain

from opsin.engine.front import Front
from opsin.errors import EngineDeadError
from opsin.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput
from opsin.processing.output import OutputKind
from opsin.processing.processor import ProcessedRequest

logger = logging.getLogger(__name__)

_MAX_JOINED = 64  # deltas told as one: with log-probabilities, writing thousands would hold up the loop

Output = RequestOutput | PoolingRequestOutput


class _Caller:
    """Where a request's outputs go: a box that one task of an event loop empties.

    ``asyncio.Queue`` serves any number of tasks, which takes several times as long, and this is done for every token.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[Output | BaseException] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def send(self, item: Output | BaseException) -> None:
        """From any thread."""
        _send(self.loop, [(self, item)])

    def put(self, item: Output | BaseException) -> None:
        """On the loop's own thread."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Output | BaseException:
        while not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        return self._items.popleft()

    def with_waiting(self, delta: RequestOutput) -> RequestOutput:
        """A delta that was got, joined with those that have come since: a reader that lags is told of all at once."""
        deltas = [delta]
        while self._items and len(deltas) < _MAX_JOINED and isinstance(self._items[0], RequestOutput):
            deltas.append(self._items.popleft())  # pyright: ignore[reportArgumentType]
        return delta if len(deltas) == 1 else join_deltas(deltas)


_Mail = tuple[_Caller, Output | BaseException]


class FrontThread:
    """Steps a front until it is stopped or dies. Any thread and any event loop may call it."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._callers: dict[str, _Caller] = {}  # the thread's own
        self._dead: EngineDeadError | None = None
        self._posting = threading.Lock()  # nothing is posted after the thread has looked for the last time
        self._thread = threading.Thread(target=self._run, name="opsin-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """False for good once it was stopped, or the engine has failed."""
        return self._dead is None

    def require_running(self) -> None:
        """See that it has not stopped.

        Raises:
            EngineDeadError: why it has.
        """
        if self._dead is not None:
            raise self._dead

    async def stream(self, processed: ProcessedRequest, kind: OutputKind) -> AsyncGenerator[Output, None]:
        """Run a request. Leaving the generator early aborts it.

        Deltas that the event loop was too busy to hand on one by one are joined; every token is told of once.

        Raises:
            OpsinError: what became of it.
        """
        caller = _Caller(asyncio.get_running_loop())
        if not self.post(lambda: self._start(processed, kind, caller)):
            self.require_running()
        finished = False
        try:
            while not finished:
                item = await caller.get()
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                if kind == "delta" and isinstance(item, RequestOutput):
                    item = caller.with_waiting(item)
                finished = item.finished
                yield item
        finally:
            if not finished:
                self.post(lambda: self._abort(processed.request.request_id, caller))

    def abort(self, request_id: str) -> None:
        """End a request; its stream ends with ``finish_reason="abort"``. Unknown and finished ones are ignored."""
        self.post(lambda: self._abort(request_id))

    def post(self, work: Callable[[], None] | None) -> bool:
        """Have the thread do something (None: stop); False when it has stopped."""
        with self._posting:
            if self._dead is not None:
                return False
            self._work.put(work)
        self._front.engine.wake()
        return True

    def stop(self) -> None:
        """Abort what runs, and close the front."""
        self.post(None)
        self._thread.join()

    # ------------------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        engine = self._front.engine
        try:
            while self._do_posted_work(wait=self._front.num_unfinished == 0 and not engine.has_work):
                if engine.has_work:
                    self._deliver()
        except EngineDeadError as error:
            self._die(error)
        except Exception as error:
            logger.exception("The engine's thread has failed.")
            self._die(EngineDeadError(f"The engine's thread has failed: {error}"))
        else:
            self._die(EngineDeadError("The engine was shut down."))
        self._front.close()

    def _do_posted_work(self, wait: bool) -> bool:
        """Do everything that was posted, waiting for the first if ``wait``; False when asked to stop."""
        try:
            work = self._work.get(block=wait)
            while work is not None:
                work()
                work = self._work.get_nowait()
        except queue.Empty:
            return True
        return False

    def _deliver(self) -> None:
        batch = self._front.step()
        mail: dict[asyncio.AbstractEventLoop, list[_Mail]] = {}  # one call per step wakes each loop once
        for request_id, error in batch.failures.items():
            caller = self._callers.pop(request_id)
            mail.setdefault(caller.loop, []).append((caller, error))
        for output in batch.outputs:
            caller = self._callers.pop(output.request_id) if output.finished else self._callers[output.request_id]
            mail.setdefault(caller.loop, []).append((caller, output))
        for loop, items in mail.items():
            _send(loop, items)

    def _start(self, processed: ProcessedRequest, kind: OutputKind, caller: _Caller) -> None:
        if self._dead is not None:  # posted in time, but not begun
            caller.send(self._dead)
            return
        try:
            self._front.start(processed, kind)
        except Exception as error:  # whatever one caller's arguments lead to, it is not the other callers' affair
            caller.send(error)
            return
        self._callers[processed.request.request_id] = caller

    def _abort(self, request_id: str, owner: _Caller | None = None) -> None:
        """Abort a request; with ``owner``, only if the id is still that caller's."""
        caller = self._callers.get(request_id)
        if caller is None or owner not in (None, caller):
            return
        del self._callers[request_id]
        output = self._front.abort(request_id)
        if output is not None:
            caller.send(output)

    def _die(self, error: EngineDeadError) -> None:
        with self._posting:
            self._dead = error
        for caller in self._callers.values():
            caller.send(error)
        self._callers.clear()
        while True:  # requests that were posted and not yet begun
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                return
            if work is not None:
                work()


def join_deltas(deltas: Sequence[RequestOutput]) -> RequestOutput:
    """Deltas of one request, in the order in which they came, as if all that is new in them had come at once."""
    parts: dict[int, list[CompletionOutput]] = {}
    for answer in chain.from_iterable(delta.outputs for delta in deltas):
        parts.setdefault(answer.index, []).append(answer)
    return replace(deltas[-1], outputs=[_join_answers(parts[index]) for index in sorted(parts)])


def _join_answers(parts: Sequence[CompletionOutput]) -> CompletionOutput:
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=None if parts[-1].logprobs is None else [p for part in parts for p in part.logprobs or ()],
    )


def _send(loop: asyncio.AbstractEventLoop, mail: Sequence[_Mail]) -> None:
    try:
        loop.call_soon_threadsafe(_hand_out, mail)
    except RuntimeError:  # the loop was closed with the requests still running
        logger.debug("A caller's event loop is closed; its output is dropped.")


def _hand_out(mail: Sequence[_Mail]) -> None:
    for caller, item in mail:
        caller.put(item)
