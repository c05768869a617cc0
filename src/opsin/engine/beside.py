"""Work on pictures beside the engine's steps, on a thread of its own."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from opsin.errors import EngineDeadError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class BesideThread(Generic[T, R]):
    """Does one batch of items after the other, in the order in which they came.

    Args:
        subject: whose thread it is, in the thread's name and in what is said when it fails.
        work: from items to their results, one each. What it raises is the engine's end: as after a failed step,
            nothing is to be trusted any more.
        on_finished: called on the thread after each batch; must be quick.
        max_items: of a batch, which takes what waits.
        deadline_s: a batch that takes longer is the engine's end, too: no thread can be killed.
        end: called by ``close`` before it waits, to make the batch that is being done fail.
    """

    def __init__(
        self,
        subject: str,
        work: Callable[[Sequence[T]], Sequence[R]],
        on_finished: Callable[[], None],
        *,
        max_items: int = 1,
        deadline_s: float = math.inf,
        end: Callable[[], None] | None = None,
    ) -> None:
        self._subject = subject
        self._work = work
        self._on_finished = on_finished
        self._max_items = max_items
        self._deadline_s = deadline_s
        self._end = end
        self._changed = threading.Condition()  # guards what follows
        self._waiting: dict[bytes, T] = {}
        self._finished: list[tuple[bytes, R]] = []
        self._error: Exception | None = None
        self._begun_s = math.inf  # of the batch that is being done
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, key: bytes, item: T) -> None:
        """Queue one item."""
        with self._changed:
            self._waiting[key] = item
            if self._thread is None:
                name = "opsin-" + self._subject.replace(" ", "-")
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def cancel(self, key: bytes) -> None:
        """Forget an item that has not begun; one that has is done for nothing."""
        with self._changed:
            self._waiting.pop(key, None)

    def poll(self) -> list[tuple[bytes, R]]:
        """What finished since the last call, without waiting.

        Raises:
            EngineDeadError: the work failed, or does not end.
        """
        with self._changed:
            if self._error is not None:
                raise EngineDeadError(f"The {self._subject} failed: {self._error}") from self._error
            if time.monotonic() - self._begun_s > self._deadline_s:
                raise EngineDeadError(f"The {self._subject} has not come back for {self._deadline_s:g} s.")
            finished, self._finished = self._finished, []
            return finished

    def close(self) -> bool:
        """Forget everything, and wait for the batch that is being done, unless ``end`` cuts it short.

        Returns:
            The thread has ended; else its batch is beyond the deadline, and the thread is left at it.
        """
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._finished.clear()
            taken_s = max(0.0, time.monotonic() - self._begun_s)
            self._changed.notify()
        if self._end is not None:
            self._end()
        if self._thread is None:
            return True
        self._thread.join(min(max(0.0, self._deadline_s - taken_s), threading.TIMEOUT_MAX))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while batch := self._take():
                results = self._work([item for _, item in batch])
                with self._changed:
                    self._begun_s = math.inf
                    self._finished += ((key, result) for (key, _), result in zip(batch, results, strict=True))
                self._on_finished()
        except Exception as error:
            with self._changed:
                if self._closed:  # and nobody asks any more
                    return
                self._error = error
            logger.exception("The %s failed; the engine stops.", self._subject)
            self._on_finished()

    def _take(self) -> list[tuple[bytes, T]]:
        """Empty when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            keys = [] if self._closed else list(self._waiting)[: self._max_items]
            self._begun_s = time.monotonic()
            return [(key, self._waiting.pop(key)) for key in keys]
