"""Reads videos' headers in worker processes, which may hang or crash on hostile bytes and take nothing along."""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import dataclass
from socket import socket

import msgspec

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestFailedError
from opsin.media.spawn import START_TIMEOUT_S, start_worker
from opsin.media.video import VideoFormat, VideoHeader, read_video_header
from opsin.media.wire import Probe, Reply, allocate, receive, send

_MAX_WORKERS = 4  # so that a few files that take their time hold up nobody else


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: socket

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class VideoProber:
    """Callable from any number of threads; each waits for its own answer. Processes start when they are needed."""

    def __init__(self, config: MediaConfig) -> None:
        self._config = config
        self._places = threading.BoundedSemaphore(_MAX_WORKERS)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def __call__(self, data: bytes, format: VideoFormat) -> VideoHeader:
        """The header of a video.

        Raises:
            MediaError: as ``opsin.media.video.read_video_header``, or it took longer than ``media_decode_timeout_s``.
            RequestFailedError: workers do not start.
        """
        max_pixels = self._config.max_image_pixels
        if self._config.media_workers == 0:
            return read_video_header(data, format, max_pixels=max_pixels)
        with self._places:
            worker = self._take()
            try:
                reply = self._ask(worker, Probe(format, max_pixels, len(data)), data)
            except BaseException:
                worker.close()
                raise
            self._give_back(worker)
        if reply.header is None:
            raise MediaError(reply.error or "The video cannot be read.", code=reply.code)
        return reply.header

    def close(self) -> None:
        """Stop the processes that are idle; those at work stop when they are done."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        worker = _Worker(*start_worker(self._config))
        try:
            worker.connection.settimeout(START_TIMEOUT_S)
            receive(worker.connection, Reply)
        except (EOFError, OSError, msgspec.MsgspecError):
            worker.close()
            raise RequestFailedError("Media workers do not start; see stderr.") from None
        return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.close()

    def _ask(self, worker: _Worker, probe: Probe, data: bytes) -> Reply:
        descriptor, memory = allocate(len(data))
        try:
            memory[:] = data
            memory.close()
            worker.connection.settimeout(self._config.media_decode_timeout_s)
            send(worker.connection, probe, [descriptor])
            return receive(worker.connection, Reply)[0]
        except TimeoutError:
            raise MediaError(
                f"Reading the video's header timed out after {self._config.media_decode_timeout_s:g} s.",
                code="video_parse_error",
            ) from None
        except (EOFError, OSError, msgspec.MsgspecError):
            raise MediaError("The decoder died on this video.", code="video_parse_error") from None
        finally:
            os.close(descriptor)
