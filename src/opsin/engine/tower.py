"""The vision tower beside the steps, so that answers do not wait for pictures. For CPUs.

A step on a CPU lasts as long as all that it computes, and one picture takes the tower as long as dozens of tokens take
the decoder. Here pictures are encoded beside the steps, on a thread and then in a process of its own, and come to the
engine as features that need no tower. On a GPU both would share the device all the same, and pictures packed into one
pass are faster.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from opsin.engine.beside import BesideThread
from opsin.engine.histogram import SHORT_SECONDS, Histogram
from opsin.engine.remote_tower import RemoteTower
from opsin.errors import EngineDeadError
from opsin.runner.executor import Embedding, Pixels
from opsin.types import MediaLayout

logger = logging.getLogger(__name__)

_WORTH_S = 1.0  # for about as long a process that starts keeps a core busy

Encode = Callable[[Pixels, MediaLayout], np.ndarray]


class Encoder(Protocol):
    """What computes features. One thread calls all but ``close``."""

    def encode(self, pixels: Pixels, layout: MediaLayout) -> np.ndarray:
        """Features, float (num_features, feature_width), of one item's pixels; waits for them."""
        ...

    def is_loading(self) -> bool:
        """Cores are wanted for that beside what ``encode`` does. Any thread may ask."""
        ...

    def close(self) -> None:
        """End: it may encode no more, and need not finish what it is at. Any thread may call it."""
        ...


class MovingTower:
    """An ``Encoder`` on the calling thread, until a process has loaded the same tower; for ever if none can.

    Args:
        here: encodes on the calling thread.
        start: starts the process.
        on_moved: ``here`` is not called any more; what it holds may be freed.
        there: the process, where it was started already. Else it is started once pictures have taken ``_WORTH_S``.
    """

    def __init__(
        self, here: Encode, start: Callable[[], RemoteTower], on_moved: Callable[[], None], there: RemoteTower | None
    ) -> None:
        self._here = here
        self._start = start
        self._on_moved = on_moved
        self._changing = threading.Lock()  # guards the next three
        self._there = there
        self._may_start = there is None
        self._is_closed = False
        self._has_moved = False
        self._spent_s = 0.0

    def encode(self, pixels: Pixels, layout: MediaLayout) -> np.ndarray:
        there = self._process()
        if there is None:
            begun_s = time.monotonic()
            features = self._here(pixels, layout)
            self._spent_s += time.monotonic() - begun_s
            return features
        if not self._has_moved:
            self._has_moved = True
            self._on_moved()
        return there.encode(pixels, layout)

    def is_loading(self) -> bool:
        there = self._there  # looked at once: the encoding thread gives up one that failed
        return there is not None and there.is_loading()

    def close(self) -> None:
        with self._changing:
            self._is_closed = True
            there = self._there
        if there is not None:
            there.close()

    def _process(self) -> RemoteTower | None:
        """The one that is loaded."""
        if self._has_moved:
            return self._there
        with self._changing:
            if self._may_start and self._spent_s >= _WORTH_S and not self._is_closed:
                self._there = self._start()
                self._may_start = False
            there = self._there
        if there is None:
            return None
        try:
            return there if there.is_loaded() else None
        except EngineDeadError as error:  # for want of memory, above all: what is here is whole
            with self._changing:
                if self._is_closed:
                    raise
                self._there = None
            logger.warning("Pictures are encoded on a thread, since the process for them failed: %s", error)
            there.close()
            return None


class TowerThread(BesideThread[tuple[Pixels, MediaLayout], Embedding]):
    """Has one picture after the other encoded, in the order in which they came.

    Args:
        encoder: ended by ``close``.
        on_finished: called on the thread after each item; must be quick.
    """

    def __init__(self, encoder: Encoder, on_finished: Callable[[], None]) -> None:
        super().__init__("vision tower", self._encode_all, on_finished, end=encoder.close)
        self.seconds = Histogram.of(SHORT_SECONDS)
        self._encoder = encoder

    def _encode_all(self, items: Sequence[tuple[Pixels, MediaLayout]]) -> list[Embedding]:
        features: list[Embedding] = []
        for pixels, layout in items:
            begun_s = time.monotonic()
            features.append(Embedding(self._encoder.encode(pixels, layout)))
            self.seconds.observe(time.monotonic() - begun_s)
        return features

    @property
    def is_loading(self) -> bool:
        """The encoder is."""
        return self._encoder.is_loading()
