"""Other programs that a benchmark starts: with a time limit, in a group of their own, and gone when they should be."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

_GONE_S = 20.0
_LOOK_S = 0.05


def say(begun_s: float, text: str) -> None:
    """Print progress with the seconds since ``begun_s`` (of ``time.monotonic``)."""
    print(f"[{time.monotonic() - begun_s:6.1f} s] {text}", flush=True)


@contextlib.contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, piped: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Start a program in a process group of its own; on the way out the whole group is killed and waited for.

    Args:
        log: takes its standard error, and its standard output unless that is ``piped``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else file,
            stderr=file,
            text=True,
            start_new_session=True,
        )
        # A time limit that ends the benchmark must not leave the program behind, on the device and on its port.
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            yield process
        finally:
            _kill_group(process)
            signal.signal(signal.SIGTERM, before)


def lines_until(process: subprocess.Popen[str], deadline_s: float) -> Iterator[str]:
    """What it prints, line by line, until it ends or the time (of ``time.monotonic``) is up."""
    assert process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read(stream: IO[str]) -> None:
        with stream:
            for line in stream:
                lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    with contextlib.suppress(queue.Empty):
        while (line := lines.get(timeout=max(0.0, deadline_s - time.monotonic()))) is not None:
            yield line


def tail(log: Path, num_lines: int = 15) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def free_port() -> int:
    """A port that nobody listens on, so that no server left over from before can answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_open(port: int) -> bool:
    """Somebody listens there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a program and all that it started; returns when none of it runs, so that the device's memory is free."""
    deadline_s = time.monotonic() + _GONE_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while _runs(process.pid):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"Process group {process.pid} still runs {_GONE_S:g} s after it was killed.")
        time.sleep(_LOOK_S)


def _runs(group: int) -> bool:
    """A process of the group is more than a zombie, which somebody has yet to ask for its exit status."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ends just now
            state, _, its_group = entry.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False
