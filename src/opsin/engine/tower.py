"""The vision tower on a thread of its own, so that answers do not wait for pictures. For CPUs.

A step on a CPU lasts as long as all that it computes, and one picture takes the tower as long as dozens of tokens take
the decoder. Here pictures are encoded beside the steps, and come to the engine as features that need no tower. The
thread is nicer than the one that steps: where cores are short, answers come first. On a GPU both would share the device
all the same, and pictures packed into one pass are faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from opsin.engine.beside import BesideThread
from opsin.engine.histogram import SHORT_SECONDS, Histogram
from opsin.engine.nice import be_nice
from opsin.runner.executor import Embedding, Pixels
from opsin.types import MediaLayout

Encode = Callable[[Pixels, MediaLayout], np.ndarray]


class TowerThread(BesideThread[tuple[Pixels, MediaLayout], Embedding]):
    """Encodes one picture after the other, in the order in which they came.

    Args:
        encode: features, float (num_features, feature_width), of one item's pixels.
        on_finished: called on the thread after each item; must be quick.
    """

    def __init__(self, encode: Encode, on_finished: Callable[[], None]) -> None:
        super().__init__("vision tower", self._encode_all, on_finished, prepare=be_nice)
        self.seconds = Histogram.of(SHORT_SECONDS)
        self._encode = encode

    def _encode_all(self, items: Sequence[tuple[Pixels, MediaLayout]]) -> list[Embedding]:
        features: list[Embedding] = []
        for pixels, layout in items:
            begun_s = time.monotonic()
            features.append(Embedding(self._encode(pixels, layout)))
            self.seconds.observe(time.monotonic() - begun_s)
        return features
