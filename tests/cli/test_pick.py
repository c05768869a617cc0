"""``opsin pick``, on the demo model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def circle(tmp_path: Path) -> Path:
    drawing = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(drawing).ellipse((20, 20, 76, 76), fill="red")
    drawing.save(tmp_path / "circle.png")
    return tmp_path / "circle.png"


def test_pick_prints_the_choices_most_probable_first(opsin_command: Command, circle: Path) -> None:
    code, out, _ = opsin_command("pick", "-q", circle, "What color is the circle?", "--choices", "blue,red,green")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["red", "100.0%"]
    assert sorted(name for name, _ in rows) == ["blue", "green", "red"]


def test_pick_with_json_prints_one_object(opsin_command: Command, circle: Path) -> None:
    code, out, _ = opsin_command("pick", "-q", "--json", circle, "Is there a circle?", "--choices", '["yes", "no"]')
    report = json.loads(out)
    assert code == 0
    assert report["best"] == "yes"
    assert list(report["choices"]) == ["yes", "no"]
    assert sum(choice["probability"] for choice in report["choices"].values()) == pytest.approx(1)


@pytest.mark.parametrize("answers", [["red", "blue, very"], ["red,blue"], ["--choices", "red,blue"]])
def test_pick_takes_answers_behind_the_question(opsin_command: Command, circle: Path, answers: list[str]) -> None:
    code, out, _ = opsin_command("pick", "-q", "--json", circle, "What color is the circle?", *answers)
    report = json.loads(out)
    assert (code, report["question"], report["best"]) == (0, "What color is the circle?", "red")
    assert len(report["choices"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["What?"], 'its answers behind it: "Is there a cat?" yes no (see opsin pick --help)'),
        (["--choices", "yes,no"], "give a question"),
        (["", "yes", "no"], "give a question"),
        (["Is it?", "--choices", "yes", "no"], "write all of them as --choices yes,no"),
        (["Is it?", "yes"], "choices has 1 entries"),
        (["Is it?", "yes", "yes"], "choices holds 'yes' more than once"),
    ],
)
def test_pick_without_question_or_answers_says_how_they_are_given(
    opsin_command: Command, arguments: list[str], message: str, circle: Path
) -> None:
    code, _, err = opsin_command("pick", circle, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1  # before a model is loaded
