"""Fetching for event loops: on threads of its own, and one fetch for all who ask for the same URL at once."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from opsin.config import MediaConfig
from opsin.errors import MediaError
from opsin.media.fetch import fetch
from opsin.types import Modality

_NUM_THREADS = 32  # they wait for the network, not for a core


class Fetcher:
    """Reads URLs under the policy of ``opsin.media.fetch``; callable from any number of event loops.

    A caller that goes away leaves the fetch to the others who wait for it; each fetch ends by its own deadline.
    """

    def __init__(self, config: MediaConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="opsin-fetch")
        self._running: dict[tuple[str, Modality], Future[bytes]] = {}
        self._lock = threading.Lock()

    async def fetch(self, url: str, modality: Modality = "image") -> bytes:
        """The bytes behind a URL; ``modality`` is what they are fetched as.

        Raises:
            MediaError: as ``opsin.media.fetch.fetch`` does; an error of this caller's own, to be changed at will.
        """
        with self._lock:
            job = self._running.get((url, modality))
            if job is None:
                job = self._threads.submit(fetch, url, self._config, modality)
                self._running[url, modality] = job
                job.add_done_callback(lambda _: self._running.pop((url, modality), None))
        try:
            return await asyncio.shield(asyncio.wrap_future(job))
        except MediaError as error:
            raise MediaError(str(error), code=error.code) from None

    def close(self) -> None:
        """Start no more fetches; those that run end by their deadlines."""
        self._threads.shutdown(wait=False, cancel_futures=True)
