"""Fixtures for model tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.factory import LlavaShape, session_folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LlavaShape], Path]:
    """Shape to checkpoint folder, each written once."""
    return session_folder(tmp_path_factory.mktemp("checkpoints"))
