"""What an offline call needs beside the engine: prompts read ahead, a progress bar, a Ctrl-C that lets a step end."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType

from tqdm.auto import tqdm

from opsin.errors import OpsinError
from opsin.outputs import PoolingRequestOutput, RequestOutput
from opsin.processing.prompts import Prompt

_NUM_READERS = 4


class ReadAhead:
    """Reads the next prompts on a few threads beside the steps of those before them: their pictures may be far away.

    Entered, it gives one reader per prompt, to be called in order.
    """

    def __init__(self, readers: Sequence[Callable[[], Prompt]]) -> None:
        self._readers = readers
        self._jobs: deque[Future[Prompt]] = deque()
        self._num_begun = 0
        self._threads = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="opsin-read")

    def __enter__(self) -> list[Callable[[], Prompt]]:
        return [self._next] * len(self._readers)

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _next(self) -> Prompt:
        while len(self._jobs) < 2 * _NUM_READERS and self._num_begun < len(self._readers):
            self._jobs.append(self._threads.submit(self._readers[self._num_begun]))
            self._num_begun += 1
        return self._jobs.popleft().result()


class Progress:
    """A bar with answers, tokens per second and pictures per second."""

    def __init__(self, total: int, pictures_before: int) -> None:
        self._bar = tqdm(total=total, desc="Answers", dynamic_ncols=True)
        self._started = time.perf_counter()
        self._pictures_before = pictures_before
        self._tokens = 0

    def advance(self, result: RequestOutput | PoolingRequestOutput | OpsinError, pictures_decoded: int) -> None:
        if isinstance(result, RequestOutput):
            self._tokens += sum(len(answer.token_ids) for answer in result.outputs)
        seconds = max(time.perf_counter() - self._started, 1e-9)
        pictures = (pictures_decoded - self._pictures_before) / seconds
        self._bar.set_postfix_str(f"{self._tokens / seconds:.1f} tokens/s, {pictures:.1f} pictures/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def between_steps() -> Generator[Callable[[], bool], None, None]:
    """Keep Ctrl-C from striking inside a step, where it would leave the engine's state half changed.

    Yields a function that tells whether Ctrl-C was pressed. A second one interrupts at once all the same.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed:
            before(number, frame)
        pressed.append(number)

    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
