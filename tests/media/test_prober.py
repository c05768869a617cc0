"""What a front asks of worker processes of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from opsin.config import MediaConfig
from opsin.media.ops import make_frames
from opsin.media.prober import VideoProber
from opsin.media.source import open_encoded
from opsin.media.wire import KEPT_BYTES

from .pictures import encode, photo, square_plan


@pytest.fixture
def prober() -> Iterator[VideoProber]:
    prober = VideoProber(MediaConfig())
    yield prober
    prober.close()


def test_tiles_are_those_made_here_whatever_their_size(prober: VideoProber) -> None:
    source = open_encoded(encode(photo(40, 30)), MediaConfig())
    for edge in (32, math.isqrt(KEPT_BYTES // 3) + 1, 8):
        plan = square_plan(source.size, edge)
        expected = np.empty(plan.num_bytes, np.uint8)
        make_frames(source.frames(plan.frames), plan, expected)
        assert np.array_equal(prober.make_tiles(source, plan), expected)
