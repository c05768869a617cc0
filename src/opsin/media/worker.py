"""A media worker: a process that decodes and resizes pictures for a ``MediaPool``, and may be killed at any moment.

It imports neither torch nor transformers and is ready in a fraction of a second. It ends when the pool's end of its
socket closes, so it cannot outlive the process that started it.
"""

from __future__ import annotations

import gc
import io
import mmap
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import IO, cast

import numpy as np
from PIL import Image

from opsin.media.confine import confine
from opsin.media.decode import decode_rgb
from opsin.media.ops import distinct
from opsin.media.raw import is_raw
from opsin.media.sniff import hush_pillow
from opsin.media.turbo import Turbo, open_turbo
from opsin.media.video import decode_frames, read_video_header
from opsin.media.wire import KEPT_BYTES, Job, Probe, Reply, carry_out, map_memory, receive, replying, send

_NICENESS = 5  # above the engine's: where cores are short, answers that go on come before new pictures


def main(descriptor: int, deadline_s: float, max_memory_bytes: int) -> None:
    """Serve jobs until the socket closes.

    Args:
        descriptor: the worker's end of the socket.
        deadline_s: the pool kills the worker when a job takes longer.
        max_memory_bytes: limit of address space; a picture that needs more fails with ``image_too_large``.
    """
    confine(max_memory_bytes)
    os.nice(_NICENESS)
    hush_pillow()
    turbo = open_turbo()
    gc.freeze()  # what is loaded stays; the collections below then look at one picture's objects alone
    with socket.socket(fileno=descriptor) as connection:
        reply = Reply()
        kept: mmap.mmap | None = None
        while True:
            try:
                send(connection, reply)
                job, descriptors = receive(connection, cast("type[Job | Probe]", Job | Probe), 2)
            except (EOFError, ConnectionError):
                return
            # The pool's own deadline comes first; should the pool be gone, the kernel ends this process.
            signal.setitimer(signal.ITIMER_REAL, 2 * deadline_s)
            if isinstance(job, Job) and len(descriptors) == 1:
                kept = map_memory(descriptors[0], KEPT_BYTES)
                os.close(descriptors.pop())
            reply = _run(job, kept, descriptors, turbo) if isinstance(job, Job) else _probe(job, descriptors)
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.collect()  # Pillow's failures leave cycles that hold whole pictures


def _run(job: Job, kept: mmap.mmap | None, descriptors: list[int], turbo: Turbo | None) -> Reply:
    tiles_bytes = job.plan.num_bytes
    if descriptors:
        try:
            source = mmap.mmap(descriptors[0], job.num_bytes, access=mmap.ACCESS_READ)
            tiles = np.frombuffer(map_memory(descriptors[1], tiles_bytes), np.uint8)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
    else:
        assert kept is not None, "it comes with the first job that is to go through it"
        tiles = np.frombuffer(kept, np.uint8, tiles_bytes)
        source = io.BytesIO(kept[tiles_bytes : tiles_bytes + job.num_bytes])
    data = source.getbuffer() if isinstance(source, io.BytesIO) else memoryview(source)
    if turbo is not None and job.picture is not None and is_raw(job.plan) and turbo.fill(data, job.picture, tiles):
        return Reply()

    def decode() -> Iterator[Image.Image]:
        if job.video is not None:
            yield from decode_frames(cast(IO[bytes], source), job.video, distinct(job.plan.frames))
        elif job.picture is not None:
            yield decode_rgb(cast(IO[bytes], source), job.picture, job.alpha)
        else:
            for frame in np.frombuffer(data, np.uint8).reshape(-1, job.plan.height, job.plan.width, 3):
                yield Image.fromarray(frame)

    return carry_out(decode, job.plan, tiles, "picture" if job.video is None else "video")


def _probe(job: Probe, descriptors: list[int]) -> Reply:
    try:
        source = mmap.mmap(descriptors[0], job.num_bytes, access=mmap.ACCESS_READ)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return replying(lambda: read_video_header(cast(IO[bytes], source), job.format, max_pixels=job.max_pixels), "video")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
