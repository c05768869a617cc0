"""The parts that models are made of. Each takes a ``Placement`` when built: its kernels, device and dtype.

Parameters are allocated, not initialised; ``opsin.models.weights`` fills them. Nothing here trains.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from opsin.kernels import Kernels


class Placement(NamedTuple):
    """Where a layer lives and what computes it.

    Attributes:
        defers_linears: linear layers get memory for their weights by ``Linear.allocate`` alone, once it is known how
            each is stored.
    """

    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    defers_linears: bool = False

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised weight."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype), requires_grad=False)
