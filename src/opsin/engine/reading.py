"""Where requests are read: on threads, so that neither an event loop nor the engine's thread ever waits for it; but for
brief ones, whose reading takes hardly longer than two changes of threads.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from opsin.config import MediaConfig
from opsin.engine.front import Front
from opsin.errors import RequestError
from opsin.media.fetcher import Fetcher
from opsin.media.sniff import plain_jpeg_size
from opsin.params import PoolingParams, SamplingParams, StructuredOutputsParams
from opsin.processing.chat import ChatOptions, MediaReference

T = TypeVar("T")

_NUM_READERS = 4
_NUM_WAITERS = 4  # for what a media worker does, which may take until its deadline and must not hold up the readers
_NUM_COMPILERS = 2

_BRIEF_CHARS = 4096  # a thousand tokens
_PART_CHARS = 64  # what reading a part takes beside its text
_BRIEF_URL_CHARS = 2**17
_JPEG_URL = "data:image/jpeg;base64,"
_HEADER_CHARS = 2048  # hold that of nearly every plain JPEG


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
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

    async def run(self, work: Callable[[], T], *, waits: bool = False) -> T:
        """Render, tokenise, open; ``waits`` where a media worker has a part in it."""
        return await self._on(self._waiters if waits else self._readers, work)

    async def run_here(self, work: Callable[[], T]) -> T:
        """Do what is brief on the event loop itself, one thing in each of its turns: many at once hold up nobody."""
        loop = asyncio.get_running_loop()
        turn = self._turns.setdefault(loop, asyncio.Lock())
        await turn.acquire()
        loop.call_soon(turn.release)
        self._require_running()
        return work()

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


def is_brief(messages: Any, params: SamplingParams | PoolingParams, options: ChatOptions) -> bool:
    """Whether a conversation has few words, at most small plain JPEGs that came with it, and nothing of which it is not
    known how long it takes. A question and a picture of 40 kB are read in a third of a millisecond.
    """
    special = ("chat_template", "chat_template_kwargs", "documents", "media_io_kwargs", "tools")
    if any(options.get(name) for name in special) or not isinstance(params, SamplingParams):
        return False
    if params.structured_outputs is not None or params.bad_words or not isinstance(messages, list):
        return False
    num_chars = num_url_chars = 0
    for message in cast("list[Any]", messages):
        if not isinstance(message, Mapping) or not message.keys() <= {"role", "content"}:
            return False
        content: Any = cast("Mapping[str, Any]", message).get("content")
        for part in cast("list[Any]", content if isinstance(content, list) else [content]):
            match part:
                case str(text) | {"type": "text", "text": str(text)}:
                    num_chars += len(text) + _PART_CHARS
                case {"type": "image_url", "image_url": {"url": str(url)}} if len(part) == 2:
                    num_url_chars += len(url)
                    num_chars += _PART_CHARS
                    if num_url_chars > _BRIEF_URL_CHARS or not _is_plain_jpeg(url):
                        return False
                case _:
                    return False
    return num_chars <= _BRIEF_CHARS


def _is_plain_jpeg(url: str) -> bool:
    """Whether a URL holds a JPEG that is opened without Pillow, whose parsers hostile headers can keep busy."""
    if not url.startswith(_JPEG_URL):
        return False
    try:
        header = binascii.a2b_base64(url[len(_JPEG_URL) : len(_JPEG_URL) + _HEADER_CHARS], strict_mode=True)
    except ValueError:
        return False
    return plain_jpeg_size(header) is not None
