"""What a GPU can do, and which kernels are for it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import triton


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; (0, 0) for what is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def hopper_kernel(name: str, device: torch.device) -> ModuleType | None:
    """The module ``name``, on the GPUs that it is for, where Triton is of the version that it has run with."""
    has_run = triton.__version__.startswith("3.6.")  # Gluon is experimental
    if capability(device) != (9, 0) or not has_run:
        return None
    return importlib.import_module(f"opsin.kernels.triton.{name}")
