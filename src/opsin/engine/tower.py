"""The vision tower beside the steps, so that answers do not wait for pictures. For CPUs.

A step on a CPU lasts as long as all that it computes, and one picture takes the tower as long as dozens of tokens take
the decoder. Here pictures are encoded beside the steps, by an ``Encoder`` (that is, ``RemoteTower``), and come to the
engine as features that need no tower. On a GPU both would share the device all the same, and pictures packed into one
pass are faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from opsin.engine.beside import BesideThread
from opsin.engine.histogram import SHORT_SECONDS, Histogram
from opsin.runner.executor import Embedding, Pixels
from opsin.types import MediaLayout


class Encoder(Protocol):
    """What computes features. One thread calls all but ``close``."""

    def wait_until_loaded(self) -> None:
        """Called once, before ``encode``."""
        ...

    def encode(self, pixels: Pixels, layout: MediaLayout) -> np.ndarray:
        """Features, float (num_features, feature_width), of one item's pixels; waits for them."""
        ...

    def close(self) -> None:
        """End now, whatever it is at: who waits for something is told that it failed. Any thread may call it."""
        ...


class TowerThread(BesideThread[tuple[Pixels, MediaLayout], Embedding]):
    """Has one picture after the other encoded, in the order in which they came.

    Args:
        encoder: ended by ``close``.
        on_finished: called on the thread after each item; must be quick.
    """

    def __init__(self, encoder: Encoder, on_finished: Callable[[], None]) -> None:
        super().__init__(
            "vision tower", self._encode_all, on_finished, prepare=encoder.wait_until_loaded, end=encoder.close
        )
        self.seconds = Histogram.of(SHORT_SECONDS)
        self._encoder = encoder

    def _encode_all(self, items: Sequence[tuple[Pixels, MediaLayout]]) -> list[Embedding]:
        features: list[Embedding] = []
        for pixels, layout in items:
            begun_s = time.monotonic()
            features.append(Embedding(self._encoder.encode(pixels, layout)))
            self.seconds.observe(time.monotonic() - begun_s)
        return features
