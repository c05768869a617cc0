"""What a front asks of worker processes of its own: videos' headers, and a picture's tiles to show.

They may hang or crash on hostile bytes, and take nothing along.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from socket import socket

import msgspec
import numpy as np

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestFailedError
from opsin.media.ops import PixelArray
from opsin.media.source import EncodedPicture, Noun
from opsin.media.spawn import START_TIMEOUT_S, start_worker
from opsin.media.video import VideoFormat, VideoHeader, read_video_header
from opsin.media.wire import Job, Probe, Reply, allocate, carry_out, receive, send, share
from opsin.types import PixelPlan

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
        descriptor = share(data)
        try:
            reply = self._reply_to(Probe(format, max_pixels, len(data)), [descriptor], "video")
        finally:
            os.close(descriptor)
        if reply.header is None:
            raise MediaError(reply.error or "The video cannot be read.", code=reply.code)
        return reply.header

    def make_tiles(self, source: EncodedPicture, plan: PixelPlan) -> PixelArray:
        """The tiles of a picture, one behind the other; what ``MediaPool`` makes, for one caller who waits.

        Raises:
            MediaError: it cannot be decoded, or it took longer than ``media_decode_timeout_s``.
            RequestFailedError: workers do not start.
        """
        if self._config.media_workers == 0:
            tiles = np.empty(plan.num_bytes, np.uint8)
            reply = carry_out(lambda: source.frames(plan.frames), plan, tiles)
        else:
            descriptors = [share(source.data)]
            try:
                descriptor, memory = allocate(plan.num_bytes)
                descriptors.append(descriptor)
                job = Job(plan, source.header, None, source.alpha, len(source.data))
                reply = self._reply_to(job, descriptors, "picture")
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            tiles = np.frombuffer(memory, np.uint8)
        if reply.error is not None:
            raise MediaError(reply.error, code=reply.code)
        return tiles

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

    def _reply_to(self, message: Probe | Job, descriptors: Sequence[int], noun: Noun) -> Reply:
        with self._places:
            worker = self._take()
            try:
                reply = self._ask(worker, message, descriptors, noun)
            except BaseException:
                worker.close()
                raise
            self._give_back(worker)
            return reply

    def _ask(self, worker: _Worker, message: Probe | Job, descriptors: Sequence[int], noun: Noun) -> Reply:
        code = "video_parse_error" if noun == "video" else "image_parse_error"
        try:
            worker.connection.settimeout(self._config.media_decode_timeout_s)
            send(worker.connection, message, descriptors)
            return receive(worker.connection, Reply)[0]
        except TimeoutError:
            what = "Reading the video's header" if noun == "video" else "Decoding the picture"
            raise MediaError(f"{what} timed out after {self._config.media_decode_timeout_s:g} s.", code=code) from None
        except (EOFError, OSError, msgspec.MsgspecError):
            raise MediaError(f"The decoder died on this {noun}.", code=code) from None
