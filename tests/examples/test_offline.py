"""The offline examples, each of their models in turn on a tiny checkpoint of its family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from opsin.config import EngineConfig
from opsin.engine.checkpoint import Checkpoint
from tests.examples.conftest import example
from tests.factories.families import FAMILIES
from tests.factories.named import ROWS

SINGLE, MULTI = "offline_inference_vision_language", "offline_inference_vision_language_multi_image"
MODELS = example(SINGLE)["MODELS"]
SHORT = ["--max-tokens", "3"]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Answers, whatever characters random weights put into them, end in a newline each."""
    return capsys.readouterr().out.split("\n")[:-1]


def test_every_family_is_among_the_examples():
    assert {row for row, _ in ROWS.values()} == {family.name for family in FAMILIES}
    assert sorted(MODELS) == sorted([*ROWS, "minicpmv"])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_single_image_example_runs_for(
    name: str, checkpoint: Callable[[str], Path], pictures: list[str], capsys: pytest.CaptureFixture[str]
):
    folder = str(checkpoint(name))
    example(SINGLE)["main"](["-m", name, "--model", folder, "--image", pictures[0], "--num-prompts", "2", *SHORT])
    assert len(lines(capsys)) >= 2


@pytest.mark.parametrize("name", sorted(name for name in MODELS if MODELS[name].video))
def test_video_example_runs_for(name: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]):
    folder = str(checkpoint(name))
    example(SINGLE)["main"](
        ["-m", name, "--model", folder, "--modality", "video", "--num-frames", "4", "--num-prompts", "1", *SHORT]
    )
    assert lines(capsys)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_example_without_a_model_type_takes_one_of_the_modality(
    modality: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    """As in the page that opsin was begun from: ``--modality video``, and no more."""
    name = example(SINGLE)["DEFAULTS"][modality]
    example(SINGLE)["main"](["--modality", modality, "--model", str(checkpoint(name)), "--num-prompts", "1", *SHORT])
    assert lines(capsys)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_example_marks_what_the_family_takes(name: str, checkpoint: Callable[[str], Path]):
    rule = Checkpoint.open(EngineConfig.from_flat({"model": str(checkpoint(name))})).rule
    model = MODELS[name]
    assert model.image in rule.placeholder("image").text.replace("{index}", "1")
    assert (model.video is not None) == (rule.max_items("video") != 0)
    if model.video:
        assert model.video in rule.placeholder("video").text


def test_video_example_refuses_models_without(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        example(SINGLE)["main"](["-m", "llava", "--modality", "video"])
    assert "llava takes no videos; these do: glm4_1v, glm4_6v, internvl," in capsys.readouterr().err


@pytest.mark.parametrize("method", ["generate", "chat"])
@pytest.mark.parametrize("name", sorted(example(MULTI)["MODELS"]))
def test_multi_image_example_runs_for(
    name: str, method: str, checkpoint: Callable[[str], Path], pictures: list[str], capsys: pytest.CaptureFixture[str]
):
    folder = str(checkpoint(name))
    example(MULTI)["main"]([*pictures, "-m", name, "--method", method, "--model", folder, *SHORT])
    assert lines(capsys)
