"""Frames between the front and its engine process: a length, then msgpack. Never pickle.

The pair of sockets has no name, so nobody else can connect to it. A frame from the front may bring one descriptor.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from typing import NamedTuple

_READ_BYTES = 2**18
_MAX_FRAME_BYTES = 2**30  # a longer one is not what the other end meant


def frame(body: bytes) -> bytes:
    """A body as it travels."""
    return len(body).to_bytes(4, "little") + body


class _Waiting(NamedTuple):
    data: memoryview
    descriptor: int | None


class FrontEnd:
    """The front's end. Nothing blocks here, so an engine process that hangs does not hold the front up."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._outbox: deque[_Waiting] = deque()
        self._inbox = bytearray()

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def wants_to_write(self) -> bool:
        """Frames wait until the other end reads."""
        return bool(self._outbox)

    def send(self, body: bytes, descriptor: int | None = None) -> None:
        """Send a frame now or by a later ``flush``. The descriptor is closed here once it is sent.

        Raises:
            EOFError: the other end is gone.
        """
        self._outbox.append(_Waiting(memoryview(frame(body)), descriptor))
        self.flush()

    def flush(self) -> None:
        """Send what the other end will take.

        Raises:
            EOFError: it is gone.
        """
        try:
            while self._outbox:
                data, descriptor = self._outbox[0]
                if descriptor is None:
                    sent = self._connection.send(data)
                else:
                    sent = socket.send_fds(self._connection, [data], [descriptor])
                    os.close(descriptor)
                self._outbox[0] = _Waiting(data[sent:], None)
                if sent == len(data):
                    self._outbox.popleft()
        except BlockingIOError:
            return
        except OSError:
            raise EOFError from None

    def receive(self) -> list[memoryview]:
        """The whole frames that have come.

        Raises:
            EOFError: the other end is gone, or sends what is no frame.
        """
        try:
            data = self._connection.recv(_READ_BYTES)
            if not data:
                raise EOFError
            self._inbox += data
        except BlockingIOError:
            pass
        except OSError:
            raise EOFError from None
        return self._cut()

    def _cut(self) -> list[memoryview]:
        if len(self._inbox) < 4 + int.from_bytes(self._inbox[:4], "little") <= _MAX_FRAME_BYTES:
            return []  # a long frame comes in many pieces; it is looked at, and copied, once
        view, frames, at = memoryview(bytes(self._inbox)), list[memoryview](), 0
        while at + 4 <= len(view):
            length = int.from_bytes(view[at : at + 4], "little")
            if length > _MAX_FRAME_BYTES:
                raise EOFError
            if at + 4 + length > len(view):
                break
            frames.append(view[at + 4 : at + 4 + length])
            at += 4 + length
        del self._inbox[:at]
        return frames

    def close(self) -> None:
        for waiting in self._outbox:
            if waiting.descriptor is not None:
                os.close(waiting.descriptor)
        self._outbox.clear()
        self._connection.close()


class EngineEnd:
    """The engine process's end: one thread reads, any thread may write."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._writing = threading.Lock()

    def send(self, body: bytes) -> None:
        """Send a frame; waits until the front has read most of it.

        Raises:
            EOFError: the front is gone.
        """
        try:
            with self._writing:
                self._connection.sendall(frame(body))
        except OSError:
            raise EOFError from None

    def receive(self) -> tuple[bytes, int | None]:
        """The next frame, and the descriptor that came with it, which is the caller's to close.

        Raises:
            EOFError: the front is gone.
        """
        try:
            prefix, descriptors, _, _ = socket.recv_fds(self._connection, 4, 1)
            if prefix:
                prefix += self._exactly(4 - len(prefix))
        except OSError:
            raise EOFError from None
        if not prefix:
            raise EOFError
        body = self._exactly(int.from_bytes(prefix, "little"))
        return body, descriptors[0] if descriptors else None

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                part = self._connection.recv(min(length - len(data), _READ_BYTES))
            except OSError:
                raise EOFError from None
            if not part:
                raise EOFError
            data += part
        return bytes(data)
