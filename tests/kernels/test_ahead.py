"""Kernels that are compiled ahead of their first launch, with Triton's real compiler and a GPU that is not there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.factories.qwen2_vl import Qwen2VLShape, write_qwen2_vl

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(part: str, folder: Path, cache: Path) -> tuple[dict[str, Any], str]:
    """What ``start_on_stand_in.py`` found, and what was logged."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "tests/kernels/start_on_stand_in.py"), part, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_start_compiles_and_loads_all_of_its_kernels_ahead(tmp_path: Path):
    folder = write_qwen2_vl(tmp_path / "model", Qwen2VLShape())
    found, log = run("start", folder, tmp_path / "cache")
    assert found["launched_ahead"] == [], "kernels ran over what others had not computed"
    assert found["later"] == [], "the rehearsal had other launches than the start"
    assert {name for name, _, _ in found["ahead"]} == set(found["launched"])
    assert {"_attention_kernel", "_row_kernel", "_greedy_kernel", "_resample_kernel"} < set(found["launched"])
    assert not any(on_disk or by_main for _, on_disk, by_main in found["ahead"])
    assert sorted(name for name, _ in found["loaded_ahead"]) == sorted(name for name, *_ in found["ahead"])
    assert not any(by_main for _, by_main in found["loaded_ahead"])
    (told,) = re.findall(r"Compiled (\d+) kernels ahead in \d+\.\d s", log)
    assert int(told) == len(found["ahead"])

    again, log = run("start", folder, tmp_path / "cache")
    assert all(on_disk for _, on_disk, _ in again["ahead"] + again["later"])
    assert again["later"], "with nothing to compile, no more than a step is rehearsed"
    assert again["launched"] == found["launched"]
    assert "ahead" not in log


@pytest.mark.slow
def test_only_the_rehearsals_own_launches_are_left_out_and_errors_stay_what_they_are(tmp_path: Path):
    found, log = run("others", tmp_path, tmp_path / "cache")
    assert found["launched_by_another_thread"] == ["fill_kernel"]
    assert found["error_of_a_wrong_kernel"] == "as ever"
    assert found["launched_after_a_failure"] == ["fill_kernel"]
    assert "RuntimeError('no memory')" in log
    assert found["hopper"] == ["_varlen_hopper_kernel"], "Gluon's, too"
    assert "hopper_later" not in found
