"""How many answers the server takes on, and the end of its life. Event-loop code: no locks."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opsin.server.errors import OverloadedError

_MEMORY_S = 60.0  # how far back the rate of finished answers looks
_MIN_WAIT_S, _MAX_WAIT_S = 1, 120


class Admission:
    """Counts answers from admission to their end, whichever it is.

    Args:
        capacity: answers that may run or wait at once.
        clock: seconds.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=1024)
        self.num_admitted = 0
        self.is_draining = False

    @contextmanager
    def enter(self, num_answers: int) -> Iterator[None]:
        """Hold places for the answers of one request.

        Raises:
            OverloadedError: there are none, or the server is about to stop.
        """
        if self.is_draining:
            raise OverloadedError("The server is shutting down.", headers={"Retry-After": str(_MIN_WAIT_S)})
        # A request larger than the whole queue is let in when it is alone: it could never be otherwise.
        if self.num_admitted and self.num_admitted + num_answers > self._capacity:
            raise OverloadedError(
                f"The server is full: {self.num_admitted} answers run or wait, and at most {self._capacity} may. "
                "Try again later.",
                headers={"Retry-After": str(self.retry_after_s())},
            )
        self.num_admitted += num_answers
        try:
            yield
        finally:
            self.num_admitted -= num_answers
            now = self._clock()
            self._ends.extend([now] * num_answers)

    def retry_after_s(self) -> int:
        """Admitted work over the rate at which answers lately ended, in whole seconds from 1 to 120."""
        now = self._clock()
        while self._ends and self._ends[0] < now - _MEMORY_S:
            self._ends.popleft()
        if not self._ends:
            return _MIN_WAIT_S
        rate = len(self._ends) / max(now - self._ends[0], 1.0)
        return min(max(math.ceil(self.num_admitted / rate), _MIN_WAIT_S), _MAX_WAIT_S)

    def drain(self) -> None:
        """Take no more; what runs may finish."""
        self.is_draining = True
