"""Threads on which requests are read, so that neither an event loop nor the engine's thread ever waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from opsin.config import MediaConfig
from opsin.engine.front import Front
from opsin.errors import RequestError
from opsin.media.fetcher import Fetcher
from opsin.params import StructuredOutputsParams
from opsin.processing.chat import MediaReference

T = TypeVar("T")

_NUM_READERS = 4
_NUM_WAITERS = 4  # for what a media worker does, which may take until its deadline and must not hold up the readers
_NUM_COMPILERS = 2


class ReadingThreads:
    """Runs what reading a request takes, each kind of work where it holds up no other kind, and fetches its media.

    Args:
        require_running: raises once requests are no longer taken.
    """

    def __init__(self, front: Front, media: MediaConfig, require_running: Callable[[], None]) -> None:
        self._front = front
        self._require_running = require_running
        self._fetcher = Fetcher(media)
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="opsin-read")
        self._waiters = ThreadPoolExecutor(_NUM_WAITERS, thread_name_prefix="opsin-wait")
        self._compilers = ThreadPoolExecutor(_NUM_COMPILERS, thread_name_prefix="opsin-grammar")

    async def run(self, work: Callable[[], T], *, waits: bool = False) -> T:
        """Render, tokenise, open; ``waits`` where a media worker has a part in it."""
        return await self._on(self._waiters if waits else self._readers, work)

    async def compile(self, form: StructuredOutputsParams) -> None:
        """See that a form of answers is compiled, which can take seconds.

        Raises:
            RequestError: it cannot be.
        """
        grammars = self._front.inputs.grammars
        if grammars is not None and not grammars.is_known(form):
            await self._on(self._compilers, lambda: grammars.check(form))

    async def fetch(self, references: Sequence[MediaReference]) -> list[bytes | None]:
        """The bytes behind each reference that is a URL; the first that fails ends the wait.

        Raises:
            MediaError: one cannot be fetched, or they are too large together.
        """
        files: list[bytes] = []

        async def one(reference: MediaReference) -> bytes | None:
            if not isinstance(reference.value, str) or reference.is_embedding:
                return None
            try:
                data = await self._fetcher.fetch(reference.value, reference.modality)
            except RequestError as error:
                error.param = error.param or reference.param
                raise
            files.append(data)
            self._front.check_num_bytes(files)  # now: the others need not come
            return data

        return await asyncio.gather(*map(one, references))

    def close(self) -> None:
        self._fetcher.close()
        for threads in (self._readers, self._waiters, self._compilers):
            threads.shutdown(wait=False)  # what they still make is refused when it is posted

    async def _on(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        self._require_running()
        return await asyncio.get_running_loop().run_in_executor(threads, work)
