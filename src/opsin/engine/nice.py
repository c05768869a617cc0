"""Threads that stand back for others: in the line for a core, and in number."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

_NICENESS = 5  # above the process's: a third of its share of a core that both want


def be_nice() -> None:
    """Have the calling thread come after the others of its process, where cores are short."""
    thread = threading.get_native_id()
    with contextlib.suppress(AttributeError, OSError):  # on Linux a thread has a niceness of its own
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)


class SharedCores:
    """How many of torch's threads the calling thread's operations use: all of them, less others' while those work.

    Two teams that together want more cores than there are wait for one another at the end of every operation, and a
    thread that waits keeps its core for a while.

    Args:
        num_threads: when nobody else works.
        num_others: threads of those who may.
        use: ``torch.set_num_threads``, which counts for the thread that calls it.
    """

    def __init__(self, num_threads: int, num_others: int, use: Callable[[int], None]) -> None:
        self._alone = num_threads
        self._beside = max(1, num_threads - num_others)
        self._use = use
        self._used = num_threads

    def share(self, is_shared: bool) -> None:
        """Before an operation: others work now, or do not."""
        wanted = self._beside if is_shared else self._alone
        if wanted != self._used:
            self._use(wanted)
            self._used = wanted
