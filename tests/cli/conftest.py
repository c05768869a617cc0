"""Fixtures for the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import opsin
from tests.cli.fakes import FakeLLM


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setattr(opsin, "AsyncLLM", FakeLLM, raising=False)
    monkeypatch.setattr(FakeLLM, "error", None)
    monkeypatch.setattr(FakeLLM, "interrupt_after", None)
    return FakeLLM


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "my picture.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


@pytest.fixture
def opsin_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``opsin ARGUMENTS``; returns the exit code, stdout and stderr."""
    from opsin.cli.main import main

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse's own way out
            code = int(exit.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
