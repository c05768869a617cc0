"""The part of a tower that knows patches alone: its blocks, and what follows where that goes patch by patch, too.

What it does depends on how many patches there are, on what comes with each, and on which of them see one another;
whatever pictures these make up, it is the same work. So a tower hands its trunk over, and whoever runs the model says
how it is run: called, as is the rule, or padded to one of few sizes and replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import numpy as np
import torch

from opsin.layers.staging import upload
from opsin.models.towers.attention import Segments


class Trunk(Protocol):
    """A bound method, so that equal ones can be told."""

    def __call__(
        self, x_PD: torch.Tensor, segments: Sequence[Segments], numbers: Sequence[torch.Tensor], /
    ) -> torch.Tensor:
        """(M, W), M a fixed share of P: one row for so and so many patches, one after the other.

        Nothing may be read on the host but shapes, those of all arguments included.
        """
        ...


class Runs(Protocol):
    """How a trunk is run; arguments as ``run``'s."""

    def __call__(
        self, trunk: Trunk, x_PD: torch.Tensor, lens: Sequence[Sequence[int]], numbers: Sequence[np.ndarray], /
    ) -> torch.Tensor: ...


def launch(
    trunk: Trunk, x_PD: torch.Tensor, lens: Sequence[Sequence[int]], numbers: Sequence[np.ndarray]
) -> torch.Tensor:
    """Call it."""
    uploaded = upload([*map(ends, lens), *numbers], x_PD.device)
    segments = [Segments(ends_B1, tuple(some)) for ends_B1, some in zip(uploaded, lens, strict=False)]
    return trunk(x_PD, segments, uploaded[len(lens) :])


_runs: ContextVar[Runs] = ContextVar("_runs", default=launch)


def run(
    trunk: Trunk, x_PD: torch.Tensor, lens: Sequence[Sequence[int]], numbers: Sequence[np.ndarray] = ()
) -> torch.Tensor:
    """What the trunk makes of some patches.

    Args:
        lens: how many patches see one another, by ``Segments`` that the trunk gets, all together as many as there are.
        numbers: what else it needs, by patches or by equal groups of them along the first axis. Zeros must do for
            patches that nobody reads.
    """
    return _runs.get()(trunk, x_PD, lens, numbers)


@contextmanager
def run_by(runs: Runs) -> Iterator[None]:
    """Inside, trunks are run so."""
    token = _runs.set(runs)
    try:
        yield
    finally:
        _runs.reset(token)


def ends(lens: Sequence[int]) -> np.ndarray:
    """int32 (B + 1,): where sequences of these lengths begin and end."""
    return np.cumsum((0, *lens), dtype=np.int32)
