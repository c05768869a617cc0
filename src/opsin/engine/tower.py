"""The vision tower on a thread of its own, so that answers do not wait for pictures. For CPUs.

A step on a CPU lasts as long as all that it computes, and one picture takes the tower as long as dozens of tokens take
the decoder. Here pictures are encoded beside the steps, and come to the engine as features that need no tower. The
thread is nicer than the one that steps: where cores are short, answers come first. On a GPU both would share the device
all the same, and pictures packed into one pass are faster.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy as np

from opsin.engine.histogram import SHORT_SECONDS, Histogram
from opsin.engine.nice import be_nice
from opsin.errors import EngineDeadError
from opsin.runner.executor import Embedding, Pixels
from opsin.types import MediaLayout

logger = logging.getLogger(__name__)

Encode = Callable[[Pixels, MediaLayout], np.ndarray]


class TowerThread:
    """Encodes one picture after the other, in the order in which they came.

    Args:
        encode: features, float (num_features, feature_width), of one item's pixels.
        on_finished: called on the thread after each item; must be quick.
    """

    def __init__(self, encode: Encode, on_finished: Callable[[], None]) -> None:
        self.seconds = Histogram.of(SHORT_SECONDS)
        self._encode = encode
        self._on_finished = on_finished
        self._changed = threading.Condition()  # guards what follows
        self._waiting: dict[bytes, tuple[Pixels, MediaLayout]] = {}
        self._finished: list[tuple[bytes, Embedding]] = []
        self._error: Exception | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, key: bytes, pixels: Pixels, layout: MediaLayout) -> None:
        """Queue one item."""
        with self._changed:
            self._waiting[key] = pixels, layout
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="opsin-tower", daemon=True)
                self._thread.start()
            self._changed.notify()

    def cancel(self, key: bytes) -> None:
        """Forget an item that has not begun; one that has is encoded for nothing."""
        with self._changed:
            self._waiting.pop(key, None)

    def poll(self) -> list[tuple[bytes, Embedding]]:
        """What finished since the last call, without waiting.

        Raises:
            EngineDeadError: the tower failed; as after a failed step, nothing is to be trusted any more.
        """
        with self._changed:
            if self._error is not None:
                raise EngineDeadError(f"The vision tower failed: {self._error}") from self._error
            finished, self._finished = self._finished, []
            return finished

    def close(self) -> None:
        """Forget everything, and wait for the item that is being encoded."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._finished.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        be_nice()
        while (task := self._take()) is not None:
            key, pixels, layout = task
            begun = time.monotonic()
            try:
                features = Embedding(self._encode(pixels, layout))
            except Exception as error:
                logger.exception("The vision tower failed; the engine stops.")
                with self._changed:
                    self._error = error
                self._on_finished()
                return
            self.seconds.observe(time.monotonic() - begun)
            with self._changed:
                self._finished.append((key, features))
            self._on_finished()

    def _take(self) -> tuple[bytes, Pixels, MediaLayout] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            key = next(iter(self._waiting))
            return key, *self._waiting.pop(key)
