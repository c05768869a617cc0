"""Answers the engine's needs: hands pictures to whoever decodes them, and their pixels or features back.

Sources stay here until their request ends, since a preempted request may need its pictures a second time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from opsin.engine.core import EngineCore
from opsin.engine.histogram import SECONDS, Histogram
from opsin.engine.tower import TowerThread
from opsin.errors import RequestError
from opsin.media.clips import VideoSource
from opsin.media.pool import MAX_PENDING, Finished, MediaPool
from opsin.media.raw import raw_plan
from opsin.media.source import EncodedPicture, PictureSource
from opsin.processing.embeddings import GivenFeatures
from opsin.processing.prompts import MediaSource
from opsin.runner.executor import Embedding, Pixels
from opsin.types import EngineRequest, MediaLayout, MediaNeed, PixelPlan

if TYPE_CHECKING:  # a server's front does without torch
    import torch

    from opsin.engine.jpegs import JpegThread


class _Job(NamedTuple):
    begun_s: float
    source: PictureSource | VideoSource
    layout: MediaLayout
    raw: PixelPlan | None
    is_on_device: bool

    @property
    def num_pixels(self) -> int:
        plan = self.layout.plan
        return plan.width * plan.height * len(plan.frames)


class MediaFeeder:
    """Between one ``EngineCore`` and one ``MediaPool``; used from the engine's thread alone.

    Args:
        tower: encodes pictures beside the steps; without one, the steps do.
        jpegs: decodes those on the device that it can and resizes; without one, the pool decodes all.
        max_raw_pixels: of pictures that are only decoded here, as ``media.raw.raw_plan`` says; 0 where the device does
            not resize.
    """

    def __init__(
        self,
        pool: MediaPool,
        tower: TowerThread | None = None,
        *,
        jpegs: JpegThread | None = None,
        max_raw_pixels: int = 0,
    ) -> None:
        self._pool = pool
        self._tower = tower
        self._jpegs = jpegs
        self._max_raw_pixels = max_raw_pixels
        self._held: dict[str, tuple[EngineRequest, Sequence[MediaSource]]] = {}
        self._backlog: deque[MediaNeed] = deque()  # the pool takes a bounded number of jobs
        self._decoding: dict[bytes, _Job] = {}
        self._encoding: set[bytes] = set()
        self._may_be_unwanted = False
        self.num_decoded = 0
        self.num_decoded_on_device = 0
        self.num_pixels_decoded = 0
        self.decode_seconds = Histogram.of(SECONDS)

    @property
    def encode_seconds(self) -> Histogram | None:
        """What pictures took beside the steps; None when the steps encode them."""
        return None if self._tower is None else self._tower.seconds

    @property
    def is_waiting(self) -> bool:
        """Pictures are being decoded or encoded."""
        return bool(self._decoding or self._encoding)

    @property
    def takes_cores(self) -> bool:
        """Others than the steps are at work on a CPU: on pictures, or on the start of what encodes them."""
        return self.is_waiting or (self._tower is not None and self._tower.is_loading)

    @property
    def num_decoding(self) -> int:
        """Pictures that were asked for and have not come."""
        return len(self._decoding) + len(self._encoding) + len(self._backlog)

    def hold(self, request: EngineRequest, sources: Sequence[MediaSource]) -> None:
        """Keep a request's sources until ``release``."""
        if sources:
            self._held[request.request_id] = (request, sources)

    def release(self, request_id: str) -> None:
        """The request has ended."""
        if self._held.pop(request_id, None) is not None:
            self._may_be_unwanted = True

    def pump(self, core: EngineCore) -> None:
        """Collect what was decoded, and start what is needed. Never waits."""
        for key, picture in () if self._jpegs is None else self._jpegs.poll():
            self._take_decoded(core, key, picture)
        for finished in self._pool.poll():
            self._hand_in(core, finished)
        for key, features in () if self._tower is None else self._tower.poll():
            self._encoding.discard(key)
            core.put_payload(key, features)
        self.tidy(core)
        self._backlog += core.take_needs()
        while self._backlog and len(self._decoding) < MAX_PENDING:
            self._start(core, self._backlog.popleft())

    def tidy(self, core: EngineCore) -> None:
        """Give up what was on its way for requests that have ended, unless others want it."""
        if not self._may_be_unwanted:
            return
        self._may_be_unwanted = False
        for key in [key for key in self._decoding if not core.wants(key)]:
            self._pool.cancel(key)
            if self._jpegs is not None:
                self._jpegs.cancel(key)
            del self._decoding[key]
        for key in [key for key in self._encoding if not core.wants(key)]:
            assert self._tower is not None
            self._tower.cancel(key)
            self._encoding.remove(key)
        self._backlog = deque(need for need in self._backlog if need.request_id in self._held)

    def close(self) -> None:
        for thread in (self._tower, self._jpegs):
            if thread is not None:
                thread.close()
        self._pool.close()
        self._held.clear()
        self._backlog.clear()

    def _start(self, core: EngineCore, need: MediaNeed) -> None:
        held = self._held.get(need.request_id)
        if held is None or need.key in self._decoding or need.key in self._encoding:  # has ended, or is on its way
            return
        request, sources = held
        if need.item >= len(sources) or request.media[need.item].key != need.key:  # a later request of the same id
            return
        source = sources[need.item]
        if isinstance(source, GivenFeatures):
            core.put_payload(need.key, Embedding(source.data))
            return
        layout = request.media[need.item].layout
        raw = raw_plan(layout.plan, self._max_raw_pixels)
        job = _Job(time.monotonic(), source, layout, raw, is_on_device=False)
        if self._jpegs is not None and raw is not None and _may_be_plain(source):
            self._decoding[need.key] = job._replace(is_on_device=True)
            self._jpegs.submit(need.key, source)
        else:
            self._submit(need.key, job)

    def _submit(self, key: bytes, job: _Job) -> None:
        self._decoding[key] = job
        self._pool.submit(key, job.source, job.raw or job.layout.plan)

    def _take_decoded(self, core: EngineCore, key: bytes, picture: torch.Tensor | None) -> None:
        job = self._decoding.get(key)
        if job is None or not job.is_on_device:  # it was given up in the meantime, and perhaps asked for again
            return
        if picture is None:
            self._submit(key, job._replace(is_on_device=False))
        else:
            del self._decoding[key]
            self.num_decoded_on_device += 1
            self._put(core, key, job, Pixels(picture, is_raw=True))

    def _hand_in(self, core: EngineCore, finished: Finished) -> None:
        assert isinstance(finished.job_id, bytes)
        job = self._decoding.pop(finished.job_id, None)
        if job is None:  # nobody waits for it any more
            return
        if finished.pixels is not None:
            self._put(core, finished.job_id, job, Pixels(finished.pixels, job.raw is not None))
        elif core.wants(finished.job_id):
            error = finished.error
            code = error.code or "image_parse_error" if isinstance(error, RequestError) else None
            core.fail_media(finished.job_id, str(error), code)

    def _put(self, core: EngineCore, key: bytes, job: _Job, pixels: Pixels) -> None:
        self.num_decoded += 1
        self.num_pixels_decoded += job.num_pixels
        self.decode_seconds.observe(time.monotonic() - job.begun_s)
        if self._tower is None:
            core.put_payload(key, pixels)
        elif core.wants(key):
            self._encoding.add(key)
            self._tower.submit(key, (pixels, job.layout))


def _may_be_plain(source: PictureSource | VideoSource) -> TypeGuard[EncodedPicture]:
    """An upright JPEG; the rest is not for the engine's thread to check."""
    return isinstance(source, EncodedPicture) and source.header.format == "JPEG" and source.header.orientation == 1
