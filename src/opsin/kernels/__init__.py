"""The seam between layers and the code that does their arithmetic: one function per operation.

``select`` chooses a ``Kernels`` once, at start; layers receive it when they are built. ``reference`` is plain torch,
runs on any device, and defines what is correct; every other set is tested against it and may replace single
operations only. Owns no state and knows no model.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from opsin.errors import ConfigError
from opsin.kernels import packed, reference
from opsin.kernels.ops import Kernels

__all__ = ["BACKENDS", "Kernels", "select"]

BACKENDS = ("auto", "reference", "packed", "triton")


def select(device: torch.device, name: str = "auto") -> Kernels:
    """Choose the kernels for a device.

    Args:
        name: 'reference' is plain torch; 'packed' is that with oneDNN's blocked weights, for CPUs; 'triton' replaces
            what it can on CUDA devices; 'auto' is the fastest that the device has.

    Raises:
        ConfigError: an unknown name, or a set that this device cannot run.
    """
    if name not in BACKENDS:
        raise ConfigError(f"kernels is {name!r}; it must be one of {', '.join(BACKENDS)}.")
    can_pack = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if name == "packed" and not can_pack:
        raise ConfigError(f"kernels 'packed' needs a CPU with oneDNN; the device is {device}. Use 'auto'.")
    if name == "packed" or (name == "auto" and can_pack):
        return packed.KERNELS
    can_compile = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if name == "triton" and not can_compile:
        raise ConfigError(f"kernels 'triton' needs a CUDA device and the triton package; the device is {device}.")
    if name == "triton" or (name == "auto" and can_compile):
        return importlib.import_module("opsin.kernels.triton").KERNELS  # triton is absent on CPU-only machines
    return reference.KERNELS
