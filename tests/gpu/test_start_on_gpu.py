"""A start with nothing compiled: by several threads at once, what one after the other would have been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.factories.qwen2_vl import Qwen2VLShape, write_qwen2_vl

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.gpu


def start(folder: Path, cache: Path, way: str) -> tuple[dict[str, Any], str]:
    """What ``start_alone.py`` found, and what was logged."""
    environment = dict(os.environ)
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests/gpu/start_alone.py"), str(folder), way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_kernels_compiled_ahead_are_those_of_a_start_and_give_its_answers(tmp_path: Path):
    folder = write_qwen2_vl(tmp_path / "model", Qwen2VLShape())
    ahead, log = start(folder, tmp_path / "ahead", "ahead")
    one_by_one, _ = start(folder, tmp_path / "one_by_one", "one by one")
    assert ahead["ids"] == one_by_one["ids"]
    assert [name for name, _, by_main in ahead["start"] if by_main] == []
    assert all(by_main for _, _, by_main in one_by_one["start"])
    assert {name for name, *_ in one_by_one["start"]} <= {name for name, *_ in ahead["start"]}
    assert f"Compiled {len(ahead['start'])} kernels ahead" in log

    warm, log = start(folder, tmp_path / "ahead", "ahead")
    assert warm["ids"] == ahead["ids"]
    assert all(on_disk for _, on_disk, _ in warm["start"] + warm["answers"])
    assert "kernels ahead" not in log
