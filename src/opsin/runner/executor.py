"""The seam between the engine and whatever runs its steps.

``InlineExecutor`` (``opsin.runner.inline``) runs them in this process; an executor over several ranks would send the
same bytes to each. Plans and results are plain data, so no caller can tell the difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from opsin.types import ModelSpec, StepPlan, StepResult

if TYPE_CHECKING:
    import torch


class Pixels(NamedTuple):
    """One item's tiles as its ``PixelPlan`` orders them: frames, then views, then rows and columns.

    ``data`` is flat uint8; tile i is (height_i, width_i, 3), RGB. Where it ``is_raw``, it is the one upright picture of
    the plan's size, (height, width, 3), and the tiles are still to be made. A tensor is such a picture, complete and on
    the device already.
    """

    data: np.ndarray | torch.Tensor
    is_raw: bool = False


class Embedding(NamedTuple):
    """Features computed by the caller: float (num_features, feature_width)."""

    data: np.ndarray


Payload = Pixels | Embedding


class MemoryPlan(NamedTuple):
    """Bytes on the device, as measured and decided at start.

    ``peak_step_bytes`` is the most that activations took in a step at full budgets; ``graph_bytes`` is for those of
    graphs, and ``decoded_bytes`` for pictures that the device has decoded and not yet encoded.
    """

    total_bytes: int
    weight_bytes: int
    kv_bytes: int
    feature_bytes: int
    peak_step_bytes: int
    num_blocks: int
    block_size: int
    graph_bytes: int = 0
    decoded_bytes: int = 0


class PendingStep(Protocol):
    """A launched step. ``result`` waits for it."""

    def result(self) -> StepResult: ...


class Executor(Protocol):
    """Runs step plans, in order."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def memory(self) -> MemoryPlan: ...

    def put_payload(self, key: bytes, payload: Payload) -> None:
        """Hold an item's pixels or embedding until a plan encodes or drops them."""
        ...

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step; returns without waiting for the device."""
        ...

    def shutdown(self) -> None: ...
