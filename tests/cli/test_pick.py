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


@pytest.mark.parametrize("arguments", [["What?"], ["--choices", "yes,no", "picture.png"]])
def test_pick_needs_a_question_and_choices(opsin_command: Command, arguments: list[str], circle: Path) -> None:
    code, _, err = opsin_command("pick", *[str(circle) if word == "picture.png" else word for word in arguments])
    assert code == 2
    assert "--choices" in err


def test_pick_tells_what_is_wrong_with_choices_in_one_line(opsin_command: Command, circle: Path) -> None:
    code, _, err = opsin_command("pick", "-q", circle, "What?", "--choices", "yes")
    assert code == 2
    assert err.splitlines()[-1].startswith("opsin: error: choices has 1 entries")
