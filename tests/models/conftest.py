"""Fixtures for model tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.factories.qwen2_vl import Qwen2VLShape, write_qwen2_vl
from tests.factory import LlavaShape, session_folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LlavaShape], Path]:
    """Shape to checkpoint folder, each written once."""
    return session_folder(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Qwen2VLShape], Path]:
    """The same for Qwen2-VL and Qwen2.5-VL."""
    return session_folder(tmp_path_factory.mktemp("qwen2_vl"), write_qwen2_vl)
