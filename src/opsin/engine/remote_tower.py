"""The vision tower in a process of its own, seen from the engine: started, asked, ended.

On a thread of the engine it would share Python's lock with the steps. Each of the hundreds of operations of a pass, and
each of a step's, gives the lock up and waits to have it back.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import numpy as np

from opsin.errors import EngineDeadError
from opsin.media.wire import receive, send, share
from opsin.models.rule import PixelNorm
from opsin.runner.executor import Pixels
from opsin.types import MediaLayout

_LONGEST_S = 600.0  # that loading, or one item, may take; a process that was stopped is not waited for any longer

# The process searches for modules exactly where this one does, whatever set its path.
_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[2:]; from opsin.engine import tower_process; "
    "sys.exit(tower_process.main(int(sys.argv[1])))"
)


class TowerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The first message: which tower to be. As ``load_model`` takes it, with names instead of torch's objects."""

    folder: str
    config: Mapping[str, Any]
    norm: PixelNorm
    dtype: str
    max_model_len: int | None
    load_format: Literal["auto", "safetensors", "dummy"]
    quantization: Literal["fp8", "int8"] | None
    seed: int
    num_threads: int
    log_level: int


class TowerItem(msgspec.Struct, frozen=True):
    """Encode one item, whose pixels lie in the memory that comes along."""

    layout: MediaLayout
    num_bytes: int


class TowerReply(msgspec.Struct, frozen=True):
    """Features of this shape, float32, in the memory that comes along; or what went wrong. The first reply has neither:
    the tower is loaded."""

    shape: tuple[int, int] | None = None
    error: str | None = None


class RemoteTower:
    """Implements ``tower.Encoder``. It loads while its maker goes on.

    Args:
        load: which tower.
    """

    def __init__(self, load: TowerLoad) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # Ctrl-C in a terminal is for others to handle. In a session of its own Linux may give the process as
                # much of a core as all of the engine's threads have, however nice it is (sched_autogroup).
                process_group=0,
            )
        self._connection.settimeout(_LONGEST_S)
        self._talking = threading.Lock()
        self._is_loaded = False
        with contextlib.suppress(OSError):  # it has ended, as the next call will find
            send(self._connection, load)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_loaded(self) -> bool:
        """It has said so; does not wait.

        Raises:
            EngineDeadError: it cannot be loaded, or the process has ended.
        """
        with self._talking:
            return self._is_loaded or (self._has_news() and self._load())

    def is_loading(self) -> bool:
        """It has not said yet that it is loaded, or cannot be, and has not ended; does not wait. Any thread may ask."""
        return not self._is_loaded and not self._has_news()

    def _has_news(self) -> bool:
        descriptor = self._connection.fileno()
        if descriptor < 0:  # another thread has closed it
            return True
        news = select.poll()
        news.register(descriptor, select.POLLIN)
        return bool(news.poll(0))

    def _load(self) -> bool:
        self._receive()
        self._is_loaded = True
        return True

    def encode(self, pixels: Pixels, layout: MediaLayout) -> np.ndarray:
        """Features, float32 (num_features, feature_width), of one item's pixels. Waits for them, and until the tower is
        loaded, without Python's lock.

        Raises:
            EngineDeadError: the tower failed, or its process has ended.
        """
        assert isinstance(pixels.data, np.ndarray)
        assert not pixels.is_raw, "on a CPU media workers make the tiles"
        with self._talking:
            if not self._is_loaded:
                self._load()
            data = np.ascontiguousarray(pixels.data)
            descriptor = share(data.data.cast("B"))
            try:
                send(self._connection, TowerItem(layout, data.nbytes), [descriptor])
            except OSError:
                raise self._ended() from None
            finally:
                os.close(descriptor)
            shape, descriptors = self._receive()
            assert shape is not None
            features = np.empty(shape, np.float32)
            for descriptor in descriptors:
                try:
                    _read(descriptor, features)
                finally:
                    os.close(descriptor)
            return features

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.wait()
        with self._talking:  # who waits for an answer has been told by now that there will be none
            self._connection.close()

    def _receive(self) -> tuple[tuple[int, int] | None, list[int]]:
        try:
            reply, descriptors = receive(self._connection, TowerReply, 1)
        except TimeoutError:
            raise EngineDeadError(f"its process has been silent for {_LONGEST_S:g} s") from None
        except (EOFError, OSError, msgspec.MsgspecError):
            raise self._ended() from None
        if reply.error is not None:
            raise EngineDeadError(reply.error)
        return reply.shape, descriptors

    def _ended(self) -> EngineDeadError:
        try:
            status = self._process.wait(0.5)  # its socket closes a moment before
        except subprocess.TimeoutExpired:
            return EngineDeadError("what its process says is not understood")
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return EngineDeadError(f"its process has ended ({how})")


def _read(descriptor: int, into: np.ndarray) -> None:
    """Fill an array from shared memory, without Python's lock; copying from a mapping would hold it."""
    rest = into.data.cast("B")
    at = 0
    while at < len(rest):
        count = os.preadv(descriptor, [rest[at:]], at)
        if not count:
            raise EngineDeadError("its features are fewer than it says")
        at += count
