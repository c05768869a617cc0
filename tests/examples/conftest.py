"""Tiny checkpoints of every family by name, and the examples as modules."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import picture

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by the name of a family, each written once a session."""
    from tests.factories.named import write_named

    base = tmp_path_factory.mktemp("named")
    return lambda name: base / name if (base / name).is_dir() else write_named(base / name, name)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of two small pictures."""
    base = tmp_path_factory.mktemp("pictures")
    for seed in (1, 2):
        picture(seed).save(base / f"{seed}.png")
    return [str(base / "1.png"), str(base / "2.png")]


def example(name: str) -> dict[str, Any]:
    """What an example's file defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))
