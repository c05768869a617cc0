"""Fetching for event loops: on threads of its own, one fetch for all who ask for the same URL at once, few per host."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

from opsin.config import MediaConfig
from opsin.errors import MediaError
from opsin.media.fetch import fetch
from opsin.types import Modality

_NUM_THREADS = 32  # they wait for the network, not for a core
_NUM_LOCAL_THREADS = 4  # for what comes along with the request, which no host on the network may hold up
_MAX_PER_HOST = 8


class _Wanted(NamedTuple):
    """One URL, the promise of its bytes, and since when it is wanted."""

    url: str
    modality: Modality
    job: Future[bytes]
    since_s: float


@dataclass(slots=True)
class _Host:
    """What is fetched from one host, and what waits for its turn."""

    num_running: int = 0
    waiting: deque[_Wanted] = field(default_factory=deque[_Wanted])


class Fetcher:
    """Reads URLs under the policy of ``opsin.media.fetch``; callable from any number of event loops.

    A caller that goes away leaves the fetch to the others who wait for it; each fetch ends by its own deadline. A slow
    host takes a few of the threads and no more.
    """

    def __init__(self, config: MediaConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="opsin-fetch")
        self._local_threads = ThreadPoolExecutor(_NUM_LOCAL_THREADS, thread_name_prefix="opsin-open")
        self._running: dict[tuple[str, Modality], Future[bytes]] = {}
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()

    async def fetch(self, url: str, modality: Modality = "image") -> bytes:
        """The bytes behind a URL; ``modality`` is what they are fetched as.

        Raises:
            MediaError: as ``opsin.media.fetch.fetch`` does; an error of this caller's own, to be changed at will.
        """
        with self._lock:
            job = self._running.get((url, modality))
            if job is None:
                job = self._begin(url, modality)
                self._running[url, modality] = job
                job.add_done_callback(lambda _: self._running.pop((url, modality), None))
        awaited = asyncio.wrap_future(job)
        awaited.add_done_callback(_look)
        await asyncio.wait((awaited,))  # who goes away while waiting cancels nothing
        try:
            return awaited.result()
        except MediaError as error:
            raise MediaError(str(error), code=error.code) from None

    def close(self) -> None:
        """Start no more fetches; those that run end by their deadlines."""
        with self._lock:
            for host in self._hosts.values():
                for wanted in host.waiting:
                    wanted.job.cancel()
                host.waiting.clear()
        for threads in (self._threads, self._local_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, url: str, modality: Modality) -> Future[bytes]:
        name = _host(url)
        if name is None:
            return self._local_threads.submit(fetch, url, self._config, modality)
        wanted = _Wanted(url, modality, Future(), time.monotonic())
        host = self._hosts.setdefault(name, _Host())
        if host.num_running < _MAX_PER_HOST:
            host.num_running += 1
            self._threads.submit(self._work_through, name, host, wanted)
        else:
            host.waiting.append(wanted)
        return wanted.job

    def _work_through(self, name: str, host: _Host, wanted: _Wanted) -> None:
        """Fetch one URL, and go on with those that wait for the same host."""
        while True:
            self._fetch(wanted)
            with self._lock:
                if not host.waiting:
                    host.num_running -= 1
                    if host.num_running == 0:
                        self._hosts.pop(name, None)
                    return
                wanted = host.waiting.popleft()

    def _fetch(self, wanted: _Wanted) -> None:
        if not wanted.job.set_running_or_notify_cancel():
            return
        config = self._config
        patience_s = config.video_fetch_timeout_s if wanted.modality == "video" else config.image_fetch_timeout_s
        try:
            if time.monotonic() - wanted.since_s > patience_s:
                raise MediaError(
                    f"Too much was asked of the {wanted.modality}'s host at once: its turn did not come within "
                    f"{patience_s:g} s.",
                    code="failed_to_download_image",
                )
            data = fetch(wanted.url, config, wanted.modality)
        except BaseException as error:
            wanted.job.set_exception(error)
        else:
            wanted.job.set_result(data)


def _look(awaited: asyncio.Future[bytes]) -> None:
    """Ask for an error that perhaps nobody is there to be told any more: asyncio would log it."""
    if not awaited.cancelled():
        awaited.exception()


def _host(url: str) -> str | None:
    """The host that an http(s) URL names; None for what is no such URL, or none at all."""
    if url[:5].lower() not in ("http:", "https"):
        return None
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
