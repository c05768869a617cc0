"""Small arrays of a step on their way to the device: packed, and moved in one copy from pinned memory.

A copy from ordinary memory can make the host wait for everything queued before it. Pinned memory comes from torch's
own cache, which knows when the device has read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 16


def upload(arrays: Sequence[np.ndarray], device: torch.device, into: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The arrays on the device, in order; the host does not wait.

    Args:
        into: uint8 on the device, at least ``num_bytes(arrays)`` long; arrays of equal shapes land at equal places.
    """
    if device.type != "cuda":
        return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]
    total = num_bytes(arrays)
    pinned = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    host = pinned.numpy()
    begin = 0
    for array in arrays:
        end = begin + array.nbytes
        host[begin:end].view(array.dtype).reshape(array.shape)[...] = array
        begin = _aligned(end)
    target = torch.empty(total, dtype=torch.uint8, device=device) if into is None else into
    target[:total].copy_(pinned, non_blocking=True)
    return views(target, arrays)


def num_bytes(arrays: Sequence[np.ndarray]) -> int:
    """What ``upload`` needs for these arrays."""
    return sum(_aligned(array.nbytes) for array in arrays)


def views(packed: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Where ``upload`` puts arrays of these shapes in its target."""
    parts: list[torch.Tensor] = []
    begin = 0
    for array in arrays:
        dtype = torch.from_numpy(array.reshape(-1)[:0]).dtype
        parts.append(packed[begin : begin + array.nbytes].view(dtype).view(array.shape))
        begin = _aligned(begin + array.nbytes)
    return parts


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
