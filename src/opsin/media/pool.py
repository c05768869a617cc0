"""Decode and resize beside the engine's steps, in worker processes that can be killed.

Threads alone do not scale (Pillow on 16 threads was measured at 4 times one thread), and a decoder that hangs or
crashes on hostile bytes must take nothing else with it. A handful of small pictures is not worth a process: without
an explicit ``media_workers`` they are done on one background thread.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import selectors
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from opsin.config import MediaConfig
from opsin.errors import MediaError, OpsinError, RequestFailedError
from opsin.media.clips import EncodedVideo, VideoSource
from opsin.media.ops import PixelArray, distinct
from opsin.media.raw import is_raw
from opsin.media.source import EncodedPicture, PictureSource
from opsin.media.spawn import START_TIMEOUT_S, start_worker
from opsin.media.turbo import Turbo, open_turbo
from opsin.media.wire import KEPT_BYTES, Job, Reply, allocate, carry_out, receive, send, share
from opsin.types import PixelPlan

logger = logging.getLogger(__name__)

INLINE_PIXELS = 8_000_000
"""Waiting source pixels, some 0.1 s of decoding, that are left to the background thread before processes start."""

MAX_PENDING = 1024
_MAX_FAILED_STARTS = 3


class Finished(NamedTuple):
    """A job's tiles, or why there are none. The tiles' memory is freed with the array, shared or not."""

    job_id: Hashable
    pixels: PixelArray | None
    error: OpsinError | None


@dataclass(slots=True, eq=False)
class _Task:
    job_id: Hashable
    source: PictureSource | VideoSource
    plan: PixelPlan

    @property
    def num_pixels(self) -> int:
        """Of the source: what decoding costs."""
        return self.plan.width * self.plan.height * len(self.plan.frames)


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: socket.socket
    deadline: float
    ready: bool = False
    task: _Task | None = None
    kept: mmap.mmap | None = None
    pixels: PixelArray | None = None  # where the task's tiles come to lie

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None

    def lay_out(self, job: Job, data: bytes | bytearray | memoryview, descriptors: list[int]) -> mmap.mmap:
        """The memory that the job's tiles come to lie in; ``descriptors`` gets those that are to go with the job."""
        tiles_bytes = job.plan.num_bytes
        if job.fits:
            if self.kept is None:
                descriptor, self.kept = allocate(KEPT_BYTES)
                descriptors.append(descriptor)
            self.kept[tiles_bytes : tiles_bytes + job.num_bytes] = data
            return self.kept
        descriptors.append(share(data))
        descriptor, tiles = allocate(tiles_bytes)
        descriptors.append(descriptor)
        return tiles


def default_num_workers() -> int:
    """As many processes as there are cores to spare beside the engine and the front."""
    return max(1, len(os.sched_getaffinity(0)) - 2)


class MediaPool:
    """Turns picture sources into tiles. Every method may be called from any thread.

    A picture that cannot be decoded, is not what its header said, or takes longer than ``media_decode_timeout_s`` (a
    video: ``video_decode_timeout_s``) fails with a ``MediaError``; the others go on. Processes start when there is
    work for them, and stay.
    """

    def __init__(
        self,
        config: MediaConfig,
        *,
        on_finished: Callable[[], None] | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        """Start nothing yet.

        Args:
            on_finished: called from one of the pool's threads after a job finished; must be quick
                (``loop.call_soon_threadsafe``, say).
            max_pending: most jobs that may be submitted and not yet collected.
        """
        self._config = config
        self._may_run_inline = not config.media_workers  # None or 0
        self._max_workers = default_num_workers() if config.media_workers is None else config.media_workers
        self._on_finished = on_finished
        self._max_pending = max_pending

        self._changed = threading.Condition()  # guards what follows
        self._tasks: dict[Hashable, _Task] = {}
        self._queue: deque[_Task] = deque()
        self._finished: dict[Hashable, Finished] = {}
        self._inline_pixels = 0
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._inline_queue: queue.SimpleQueue[_Task | None] | None = None
        self._wake: int | None = None  # an eventfd, while the dispatcher runs

        self._workers: list[_Worker] = []  # the dispatcher's own, as is the following
        self._failed_starts = 0

    def __enter__(self) -> MediaPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_pending(self) -> int:
        """Jobs submitted and not yet collected."""
        return len(self._tasks) + len(self._finished)

    @property
    def num_waiting(self) -> int:
        """Jobs that no worker process has taken up yet."""
        return len(self._queue)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.process.pid for worker in list(self._workers)]

    def submit(self, job_id: Hashable, source: PictureSource | VideoSource, plan: PixelPlan) -> None:
        """Queue one picture or video.

        Raises:
            RequestFailedError: ``max_pending`` jobs are waiting already.
        """
        task = _Task(job_id, source, plan)
        with self._changed:
            assert not self._closed, "submit() after close()"
            assert job_id not in self._tasks, f"job {job_id!r} is pending already"
            assert job_id not in self._finished, f"job {job_id!r} is not collected yet"
            if self.num_pending >= self._max_pending:
                raise RequestFailedError(f"{self.num_pending} pictures wait to be decoded already; try again later.")
            self._tasks[job_id] = task
            if self._goes_inline(task):
                self._inline_pixels += task.num_pixels
                self._inline().put(task)
            else:
                self._queue.append(task)
                self._wake_dispatcher()

    def poll(self) -> list[Finished]:
        """What finished since the last call, without waiting."""
        with self._changed:
            return self._take()

    def wait(self, timeout_s: float | None = None) -> list[Finished]:
        """Wait until something finished; an empty list when the time is up or nothing is pending."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished or not self._tasks, timeout_s)
            return self._take()

    def cancel(self, job_id: Hashable) -> None:
        """Forget a job, whatever its state; it will not be reported. One that runs is let run, for nothing."""
        with self._changed:
            task = self._tasks.pop(job_id, None)
            if task in self._queue:
                self._queue.remove(task)
            self._finished.pop(job_id, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Kill the workers and forget every job."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._tasks.clear()
            self._queue.clear()
            self._finished.clear()
            if self._inline_queue is not None:
                self._inline_queue.put(None)
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # where an engine that nobody held was found by the collector
                thread.join()
        if self._wake is not None:
            os.close(self._wake)
            self._wake = None

    # ------------------------------------------------------------------------- on the caller's thread, locked

    def _take(self) -> list[Finished]:
        finished = list(self._finished.values())
        self._finished.clear()
        return finished

    def _goes_inline(self, task: _Task) -> bool:
        if self._max_workers == 0:
            return True
        if isinstance(task.source, EncodedVideo):  # long work for a C library
            return False
        return self._may_run_inline and not self._workers and self._inline_pixels + task.num_pixels <= INLINE_PIXELS

    def _inline(self) -> queue.SimpleQueue[_Task | None]:
        if self._inline_queue is None:
            self._inline_queue = queue.SimpleQueue()
            self._start_thread("opsin-media-inline", self._run_inline)
        return self._inline_queue

    def _wake_dispatcher(self) -> None:
        if self._wake is None:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._start_thread("opsin-media-pool", self._dispatch_until_closed)
        else:
            os.eventfd_write(self._wake, 1)

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # ------------------------------------------------------------------------------------- on either thread

    def _finish(self, task: _Task, pixels: PixelArray | None, error: OpsinError | None) -> None:
        with self._changed:
            if self._tasks.get(task.job_id) is not task:  # cancelled, or closed
                return
            del self._tasks[task.job_id]
            self._finished[task.job_id] = Finished(task.job_id, pixels, error)
            self._changed.notify_all()
        if self._on_finished is not None:
            self._on_finished()

    def _conclude(self, task: _Task, pixels: PixelArray | None, reply: Reply) -> None:
        if reply.error is None:
            self._finish(task, pixels, None)
        else:
            self._finish(task, None, MediaError(reply.error, code=reply.code))

    # --------------------------------------------------------------------------------- on the inline thread

    def _run_inline(self) -> None:
        assert self._inline_queue is not None
        turbo = open_turbo()
        while (task := self._inline_queue.get()) is not None:
            if self._tasks.get(task.job_id) is task:
                try:
                    self._conclude(task, *_carried_out(task.source, task.plan, turbo))
                except Exception:
                    logger.exception("A picture could not be processed")
                    self._finish(task, None, RequestFailedError("The picture could not be processed."))
            with self._changed:
                self._inline_pixels -= task.num_pixels

    # ------------------------------------------------------------------------------------ on the dispatcher

    def _dispatch_until_closed(self) -> None:
        assert self._wake is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._closed:
                try:
                    self._dispatch_once(selector)
                except Exception:  # too few descriptors or processes, or our own bug: nobody may wait for ever
                    logger.exception("The media pool starts anew")
                    self._fail_all("Pictures cannot be processed at the moment; the log has the reason.")
                    self._discard_all(selector)
            self._discard_all(selector)

    def _dispatch_once(self, selector: selectors.BaseSelector) -> None:
        self._assign(selector)
        for key, _ in selector.select(self._seconds_left()):
            if isinstance(key.data, _Worker):
                self._receive(selector, key.data)
            else:
                os.eventfd_read(key.fd)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if not worker.idle and worker.deadline <= now]:
            self._bury(selector, worker, "Decoding the {noun} timed out after {seconds:g} s.")

    def _assign(self, selector: selectors.BaseSelector) -> None:
        """Give queued tasks to idle workers; start a process for every one that is left, up to the limit."""
        for worker in [worker for worker in self._workers if worker.idle]:
            while worker.idle and worker in self._workers:  # what is settled without the worker leaves it idle
                with self._changed:
                    if not self._queue:
                        return
                    task = self._queue.popleft()
                try:
                    self._give(selector, worker, task)
                except Exception:
                    self._put_back(task)  # where it is found with the others that fail now
                    raise
        num_starting = sum(not worker.ready for worker in self._workers)
        num_free = self._max_workers - len(self._workers)
        for _ in range(min(len(self._queue) - num_starting, num_free)):
            self._start_worker(selector)

    def _start_worker(self, selector: selectors.BaseSelector) -> None:
        process, connection = start_worker(self._config)
        worker = _Worker(process, connection, deadline=time.monotonic() + START_TIMEOUT_S)
        self._workers.append(worker)
        selector.register(connection, selectors.EVENT_READ, worker)

    def _give(self, selector: selectors.BaseSelector, worker: _Worker, task: _Task) -> None:
        source = task.source
        picture = source.header if isinstance(source, EncodedPicture) else None
        video = source.header if isinstance(source, EncodedVideo) else None
        if isinstance(source, EncodedPicture | EncodedVideo):
            data = source.data
        else:
            try:
                data = bytearray().join(frame.tobytes() for frame in source.frames(distinct(task.plan.frames)))
            except MediaError as error:
                self._finish(task, None, MediaError(str(error), code=error.code))
                return
            if is_raw(task.plan):  # nothing is left to do
                self._finish(task, np.frombuffer(data, np.uint8), None)
                return
        alpha = source.alpha if isinstance(source, EncodedPicture) else "white"
        job = Job(task.plan, picture, video, alpha, len(data))
        descriptors: list[int] = []
        try:
            tiles = worker.lay_out(job, data, descriptors)
            send(worker.connection, job, descriptors)
        except (ConnectionError, TimeoutError):  # it died before it was given the job
            self._discard(selector, worker)
            self._put_back(task)
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        worker.task = task
        worker.pixels = np.frombuffer(tiles, np.uint8, task.plan.num_bytes)
        worker.deadline = time.monotonic() + self._seconds_for(task)

    def _put_back(self, task: _Task) -> None:
        with self._changed:
            if self._tasks.get(task.job_id) is task:
                self._queue.appendleft(task)

    def _receive(self, selector: selectors.BaseSelector, worker: _Worker) -> None:
        try:
            reply, _ = receive(worker.connection, Reply)
        except ConnectionResetError:  # it died with the job unread, so not of it
            task, worker.task = worker.task, None
            self._bury(selector, worker, "")
            if task is not None:
                self._put_back(task)
            return
        except (EOFError, OSError, msgspec.MsgspecError):
            self._bury(selector, worker, "The decoder died on this {noun}.")
            return
        if not worker.ready:
            worker.ready = True
            self._failed_starts = 0
        elif worker.task is not None:
            task, pixels = worker.task, worker.pixels
            worker.task = worker.pixels = None
            # Out of what is kept; and where the source alone was too large for it, because a mapping may hold a
            # descriptor, as map_memory() says, and a thousand pictures may wait.
            if pixels is not None and pixels.nbytes <= KEPT_BYTES:
                pixels = pixels.copy()
            self._conclude(task, pixels, reply)

    def _seconds_for(self, task: _Task) -> float:
        videos = isinstance(task.source, EncodedVideo)
        return self._config.video_decode_timeout_s if videos else self._config.media_decode_timeout_s

    def _seconds_left(self) -> float | None:
        deadlines = [worker.deadline for worker in self._workers if not worker.idle]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _bury(self, selector: selectors.BaseSelector, worker: _Worker, reason: str) -> None:
        """Remove a worker that died or is to die, and fail what it was doing. ``_assign`` replaces it."""
        self._discard(selector, worker)
        if worker.task is not None:
            noun = worker.task.source.noun
            code = "video_parse_error" if noun == "video" else "image_parse_error"
            said = reason.format(noun=noun, seconds=self._seconds_for(worker.task))
            self._finish(worker.task, None, MediaError(said, code=code))
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._failed_starts = 0
                self._fail_all(f"Media workers do not start (exit status {worker.process.returncode}); see stderr.")

    def _discard_all(self, selector: selectors.BaseSelector) -> None:
        for worker in list(self._workers):
            self._discard(selector, worker)

    def _discard(self, selector: selectors.BaseSelector, worker: _Worker) -> None:
        selector.unregister(worker.connection)
        worker.connection.close()
        worker.process.kill()
        worker.process.wait()
        self._workers.remove(worker)

    def _fail_all(self, reason: str) -> None:
        with self._changed:
            tasks = list(self._queue) + [worker.task for worker in self._workers if worker.task is not None]
            self._queue.clear()
        for task in tasks:
            self._finish(task, None, RequestFailedError(reason))


def _carried_out(source: PictureSource | VideoSource, plan: PixelPlan, turbo: Turbo | None) -> tuple[PixelArray, Reply]:
    pixels = np.empty(plan.num_bytes, np.uint8)
    if turbo is not None and isinstance(source, EncodedPicture) and is_raw(plan):
        if turbo.fill(source.data, source.header, pixels):
            return pixels, Reply()
    return pixels, carry_out(lambda: source.frames(distinct(plan.frames)), plan, pixels, source.noun)
