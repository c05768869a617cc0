"""How an offline call runs: prompts read ahead, steps in the caller's own thread, a bar, a Ctrl-C that ends no step."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

from opsin.engine.beam import beam_search
from opsin.engine.front import Front
from opsin.errors import OpsinError, RequestError
from opsin.outputs import BeamSearchOutput, PoolingRequestOutput, RequestOutput
from opsin.params import BeamSearchParams, PoolingParams, SamplingParams
from opsin.processing.prompts import Prompt

Output = RequestOutput | PoolingRequestOutput
Reader = Callable[[], Prompt]

_MAX_SHOWN = 32  # outputs of larger calls keep no pictures for notebooks: a data set's would fill the memory
_READ_PER_STEP = 16
_QUEUE_FACTOR = 2  # requests handed to the engine ahead of those that can run, so that decoding pictures keeps ahead
_NUM_READERS = 4


class OfflineCalls:
    """Runs calls to their ends, each in the thread that made it. Threads take turns; ``AsyncLLM`` batches them."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._ids = map(str, itertools.count())
        self._turn = threading.Lock()

    def run(
        self,
        readers: Sequence[Reader],
        params: Sequence[SamplingParams | PoolingParams],
        *,
        use_tqdm: bool,
        priority: Sequence[int] | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Run prompts to their end; each is read only when its turn is near, beside the steps of those before it.

        Args:
            readers, params, priority: one per prompt; the readers are called in order.

        Returns:
            Per prompt, the kind of output that its parameters ask for; with ``return_exceptions``, or its error.
        """
        if priority is not None and len(priority) != len(readers):
            raise RequestError(f"priority has {len(priority)} entries for {len(readers)} prompts; give one per prompt.")
        front = self._front
        results: list[Output | OpsinError | None] = [None] * len(readers)
        index_of: dict[str, int] = {}
        most_waiting = _QUEUE_FACTOR * front.engine.facts.max_num_seqs
        # The first pictures are decoded, and run, while later prompts are read; priorities must all be known first.
        most_read = _READ_PER_STEP if priority is None else most_waiting
        position = 0
        progress = Progress(len(readers), front) if use_tqdm else None

        def settle(request_id: str, result: Output | OpsinError) -> None:
            if isinstance(result, OpsinError):
                _note_place(result, index_of[request_id], len(readers))
                if not return_exceptions:
                    raise result
            results[index_of.pop(request_id)] = result
            if progress is not None:
                progress.advance(result)

        self._turn.acquire()
        try:
            with between_steps() as interrupted:
                while position < len(readers) or index_of:
                    last = min(len(readers), position + most_read)
                    while position < last and front.num_unfinished < most_waiting and not interrupted():
                        request_id = next(self._ids)
                        index_of[request_id] = position
                        try:
                            front.submit(
                                request_id,
                                readers[position](),
                                params[position],
                                priority=0 if priority is None else priority[position],
                                thumbnails=len(readers) <= _MAX_SHOWN,
                            )
                        except RequestError as error:
                            settle(request_id, error)
                        position += 1
                    batch = front.step()
                    for request_id, error in batch.failures.items():
                        settle(request_id, error)
                    for output in batch.outputs:
                        settle(output.request_id, output)
                    if interrupted():
                        raise KeyboardInterrupt
        finally:
            for request_id in index_of:
                front.abort(request_id)
            front.come_to_rest()
            self._turn.release()
            if progress is not None:
                progress.close()
        return [result for result in results if result is not None]

    def search(self, readers: Sequence[Reader], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """Search for the likeliest answers to prompts, side by side."""
        with self._turn, between_steps() as interrupted:
            return beam_search(self._front, [(next(self._ids), read()) for read in readers], params, interrupted)


class ReadAhead:
    """Reads the next prompts on a few threads beside the steps of those before them: their pictures may be far away.

    Entered, it gives one reader per prompt, to be called in order.
    """

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = readers
        self._jobs: deque[Future[Prompt]] = deque()
        self._num_begun = 0
        self._threads = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="opsin-read")

    def __enter__(self) -> list[Reader]:
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

    def __init__(self, total: int, front: Front) -> None:
        self._bar = tqdm(total=total, desc="Answers", dynamic_ncols=True, disable=sys.stderr is None)
        self._started = time.perf_counter()
        self._front = front
        self._pictures_before = self._num_decoded()
        self._tokens = 0

    def advance(self, result: Output | OpsinError) -> None:
        if isinstance(result, RequestOutput):
            self._tokens += sum(len(answer.token_ids) for answer in result.outputs)
        seconds = max(time.perf_counter() - self._started, 1e-9)
        pictures = (self._num_decoded() - self._pictures_before) / seconds
        self._bar.set_postfix_str(f"{self._tokens / seconds:.1f} tokens/s, {pictures:.1f} pictures/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def _num_decoded(self) -> float:
        return self._front.engine.stats()["num_pictures_decoded_total"]


def _note_place(error: OpsinError, index: int, count: int) -> None:
    """Have tracebacks say which prompt of a call an error is about, and where in it."""
    places = [f"prompt {index} of {count} (counted from 0)"] if count > 1 else []
    if isinstance(error, RequestError) and error.param is not None:
        places.append(error.param)
    if places:
        error.add_note(f"This is about {', '.join(places)}.")


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
