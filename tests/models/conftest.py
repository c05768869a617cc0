"""Fixtures for model tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.factories.family import Family
from tests.factory import LlavaShape, session_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family, str], Path]:
    """Family and name of a shape to checkpoint folder, each written once."""
    folders: dict[Family, Callable[..., Path]] = {}

    def get(family: Family, name: str) -> Path:
        if family not in folders:
            folders[family] = session_folder(tmp_path_factory.mktemp(family.name), family.write)
        return folders[family](family.shapes[name])

    return get


@pytest.fixture(scope="session")
def checkpoint(tiny_llava: Callable[[LlavaShape], Path]) -> Callable[[LlavaShape], Path]:
    """LLaVA's, by shape."""
    return tiny_llava
