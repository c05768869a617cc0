"""Small arrays of a step on their way to the device: packed, and moved in one copy from pinned memory.

A copy from ordinary memory can make the host wait for everything queued before it. Pinned memory comes from torch's
own cache, which knows when the device has read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch

_ALIGNMENT = 16

Uploads = list[list[torch.Tensor]]
"""What each call of ``upload`` returned, in order."""

_noting: ContextVar[Uploads | None] = ContextVar("_noting", default=None)
_handing_out: ContextVar[Iterator[list[torch.Tensor]] | None] = ContextVar("_handing_out", default=None)


def upload(arrays: Sequence[np.ndarray], device: torch.device, into: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The arrays on the device, in order; the host does not wait.

    Args:
        into: as ``packed`` of ``refill``, rather than new memory.
    """
    given = _handing_out.get()
    if given is not None:
        return next(given)
    uploaded = _upload(arrays, device, into)
    noted = _noting.get()
    if noted is not None:
        noted.append(uploaded)
    return uploaded


@contextmanager
def noting() -> Iterator[Uploads]:
    """Keep what is uploaded inside, so that the same work can be done again with ``handing_out``."""
    uploads: Uploads = []
    token = _noting.set(uploads)
    try:
        yield uploads
    finally:
        _noting.reset(token)


@contextmanager
def handing_out(uploads: Uploads) -> Iterator[None]:
    """Inside, nothing is uploaded: calls get what was noted, in order. A CUDA graph can capture no copy from the host
    whose memory is then used for something else, and work on equal sizes uploads equal numbers."""
    token = _handing_out.set(iter(uploads))
    try:
        yield
    finally:
        _handing_out.reset(token)


def _upload(arrays: Sequence[np.ndarray], device: torch.device, into: torch.Tensor | None) -> list[torch.Tensor]:
    if device.type != "cuda" and into is None:
        return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]
    packed = torch.empty(num_bytes(arrays), dtype=torch.uint8, device=device) if into is None else into
    refill(packed, arrays)
    return views(packed, arrays)


def refill(packed: torch.Tensor, arrays: Sequence[np.ndarray]) -> None:
    """Write arrays to where ``views`` finds those of their shapes; the host does not wait.

    Args:
        packed: uint8 on the device, at least ``num_bytes(arrays)`` long.
    """
    pinned = torch.empty(num_bytes(arrays), dtype=torch.uint8, pin_memory=packed.is_cuda)
    host = pinned.numpy()
    begin = 0
    for array in arrays:
        end = begin + array.nbytes
        host[begin:end].view(array.dtype).reshape(array.shape)[...] = array
        begin = _aligned(end)
    packed[: len(pinned)].copy_(pinned, non_blocking=True)


def num_bytes(arrays: Sequence[np.ndarray]) -> int:
    """What these arrays take when packed."""
    return sum(_aligned(array.nbytes) for array in arrays[:-1]) + sum(array.nbytes for array in arrays[-1:])


def views(packed: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Where ``refill`` puts arrays of these shapes."""
    parts: list[torch.Tensor] = []
    begin = 0
    for array in arrays:
        dtype = torch.from_numpy(array.reshape(-1)[:0]).dtype
        parts.append(packed[begin : begin + array.nbytes].view(dtype).view(array.shape))
        begin = _aligned(begin + array.nbytes)
    return parts


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
