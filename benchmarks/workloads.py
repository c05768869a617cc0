"""What is asked of every engine, and the pictures for it: equal names give equal bytes, whoever makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pictures
import shapes

Request = tuple[str, bytes]
"""A prompt with one picture, and the picture's JPEG."""

NUM_STREAMED = 12
"""Requests of w2, one after the other; the first two are not counted."""


class Workload(NamedTuple):
    """Requests with one picture each.

    Attributes:
        title: what it is, and the unit of its figure.
        sizes: of the pictures, in turn.
        tokens: of every answer; 0 makes vectors instead.
        num_asked: how often each picture is asked.
        num_runs: on different pictures; the best one counts.
    """

    title: str
    sizes: tuple[tuple[int, int], ...]
    tokens: int
    num_asked: int = 1
    num_runs: int = 2

    def num_pictures(self, num_requests: int) -> int:
        return num_requests // self.num_asked


WORKLOADS = {
    "w1": Workload("W1: mixed sizes, 64 tokens, requests/s", pictures.MIXED, 64),
    "w3": Workload("W3: 1024x768, one token, pictures/s", pictures.XGA, 1),
    "w5": Workload("W5: each picture asked four times, requests/s", pictures.MIXED, 64, num_asked=4),
    "embed": Workload("a vector of each 1024x768 picture, pictures/s", pictures.XGA, 0),
}
"""Those that are asked all at once, in the order in which they should run; w2 comes last."""
STREAMED = Workload("W2: one at a time, 640x480, 128 tokens", pictures.VGA, 128, num_runs=1)
WARM = Workload("", pictures.MIXED, 16, num_runs=1)
NAMES = (*WORKLOADS, "w2")


def make_pictures(folder: Path, wanted: Sequence[str], num_requests: int, *, extra_runs: int = 0) -> None:
    """Make the pictures of some workloads, each run's its own; those that are there already are kept."""
    sets = {"warm": (min(48, num_requests), WARM.sizes)}
    for name in wanted:
        workload = STREAMED if name == "w2" else WORKLOADS[name]
        count = NUM_STREAMED if name == "w2" else workload.num_pictures(num_requests)
        sets |= {f"{name}{run}": (count, workload.sizes) for run in range(workload.num_runs + extra_runs)}
    pictures.make_sets(folder, sets)


def requests_of(folder: Path, shape: str, tag: str, num_asked: int = 1) -> list[Request]:
    """The requests with the pictures of one tag; ``num_asked`` different questions on each."""
    jpegs = [path.read_bytes() for path in sorted(folder.glob(f"{tag}_*.jpg"))]
    shown = [jpeg for jpeg in jpegs for _ in range(num_asked)]
    return [(shapes.prompt(shape, index), jpeg) for index, jpeg in enumerate(shown)]
