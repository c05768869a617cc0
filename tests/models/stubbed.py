"""Hugging Face's video processors where torchvision is not installed: they want it for their pixels alone."""

from __future__ import annotations

import importlib
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import transformers.video_processing_utils  # noqa: F401  # before torchvision seems to be there

_NAMES = "torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional"


def video_processor(family: str, name: str) -> Any:
    """The class of that name, whose module sees a torchvision that is empty; other modules see none."""
    stubs = {name: ModuleType(name) for name in _NAMES}
    for outer, inner in itertools.pairwise(_NAMES):
        setattr(stubs[outer], inner.rpartition(".")[2], stubs[inner])
    path = f"transformers.models.{family}.video_processing_{family}"
    with pytest.MonkeyPatch.context() as patch:
        for stub_name, stub in stubs.items():
            patch.setitem(sys.modules, stub_name, stub)
        return getattr(importlib.import_module(path), name)
