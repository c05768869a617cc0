"""Triton's kernels, for the tests of them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture(scope="module")
def kernels() -> Any:
    """Not from ``select``, which offers them for CUDA devices only."""
    pytest.importorskip("triton")
    return importlib.import_module("opsin.kernels.triton").KERNELS
