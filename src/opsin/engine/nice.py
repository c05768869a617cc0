"""Threads that stand back for others."""

from __future__ import annotations

import contextlib
import os
import threading

_NICENESS = 5  # above the process's: a third of its share of a core that both want


def be_nice() -> None:
    """Have the calling thread come after the others of its process, where cores are short."""
    thread = threading.get_native_id()
    with contextlib.suppress(AttributeError, OSError):  # on Linux a thread has a niceness of its own
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
