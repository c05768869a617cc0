"""``opsin verify``: agreement on every family that transformers has, and what a difference looks like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsin.cli import main, verify
from opsin.cli.oracle import OracleAnswer
from tests.factories.families import over
from tests.factories.family import Family


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.main(["verify", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # transformers', of NumPy
@over(lambda family: () if family.oracle else family.served)
def test_verify_tiny_checkpoint_agrees(family: Family, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = family.write(tmp_path / "model", family.shapes[name])
    code, out, err = run(capsys, str(folder), "--json", "--dtype", "float32")
    if "needs torchvision" in err:
        assert code == 3
        pytest.skip("transformers' processor of this family needs torchvision")
    report = json.loads(out)
    assert code == 0, report
    assert report["agrees"] is True
    assert {"one picture", "text alone"} <= {case["case"] for case in report["cases"]}
    assert all(case["same_tokens"] == case["num_tokens"] for case in report["cases"])
    assert report["cases"][0]["num_tokens"] == 16


def test_verify_demo_prints_a_table(capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "demo", "--dtype", "float32")
    assert code == 0
    assert out.count("same") == 3  # of the prompts with pictures
    assert "opsin agrees with transformers" in out


def test_verify_dummy_weights_are_refused(capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, "demo", "--load-format", "dummy")
    assert code == 2
    assert "real weights" in err


def test_verify_model_that_transformers_lacks_gets_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object) -> None:
        raise ValueError("Unrecognized model")

    monkeypatch.setattr("opsin.cli.oracle.Oracle.__init__", refuse)
    code, out, err = run(capsys, "demo")
    assert (code, out) == (3, "")
    assert "No verdict" in err
    assert "Unrecognized model" in err


def answer(ids: Sequence[int], logprobs: Sequence[float], pixels: Sequence[float] | None = None) -> Any:
    made = None if pixels is None else np.array(pixels, np.float32)
    return verify._Answer("case", "prompt", [], [1, 2], list(ids), list(logprobs), made)


def theirs(rows: Sequence[Sequence[float]], prompt: list[int] | None = None, pixels: Any = None) -> OracleAnswer:
    made = None if pixels is None else np.array(pixels, np.float32)
    return OracleAnswer([1, 2] if prompt is None else prompt, made, np.array(rows, np.float32))


@pytest.mark.parametrize(
    ("ours", "other", "passes"),
    [
        (answer([0, 1], [-0.1, -0.2]), theirs([[-0.1, -3], [-3, -0.2]]), True),
        (answer([0, 1], [-0.1, -0.2]), theirs([[-0.1, -3], [-0.1, -3]]), False),  # another token
        (answer([0, 1], [-0.1, -0.6931]), theirs([[-0.1, -3], [-0.693, -0.6931]]), True),  # a tie
        (answer([0], [-0.1]), theirs([[-0.2, -3]]), False),  # another probability
        (answer([0, 1], [-0.1, -9]), theirs([[-0.1, -3]]), True),  # the rest is not scored
        (answer([0], [-0.1]), theirs([[-0.1, -3]], prompt=[1, 3]), False),
        (answer([0], [-0.1], [0.5, 0.25]), theirs([[-0.1, -3]], pixels=[0.25, 0.5, 0.5, 0.25]), True),
        (answer([0], [-0.1], [0.5, 0.25]), theirs([[-0.1, -3]], pixels=[0.25, 0.51]), False),
    ],
    ids=["same", "token", "tie", "probability", "a part", "prompt", "pixels twice", "pixels"],
)
def test_verdict_passes_only_what_the_dtype_explains(ours: Any, other: OracleAnswer, passes: bool):
    assert verify._verdict(ours, other, 1e-3).passes(1e-3) is passes
