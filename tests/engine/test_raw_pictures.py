"""Pictures that the device resizes, with the reference in its place: the same answers from the same features."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.engine import build
from opsin.errors import MediaError
from opsin.kernels import reference
from opsin.media.raw import MAX_RAW_PIXELS, raw_plan
from opsin.runner.executor import Pixels
from opsin.runner.pixels import PixelLoader
from opsin.types import PixelPlan
from tests.engine.conftest import asked, assert_idle, picture
from tests.factories.families import FAMILIES
from tests.factories.family import Family

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
# One tile; a window behind the resize, and a border before it; several views, of which one is cut into tiles; Lanczos.
NAMES = ("qwen2_vl", "llava", "llava_next", "internvl", "idefics3", "phi3_v")
ALONE: Mapping[str, Any] = {"max_num_batched_patches": 1}  # a picture's last bits depend on whom it is packed with


class Roads(NamedTuple):
    """Engines over one checkpoint, whose workers resize and whose device resizes; what the second one's loader saw."""

    family: Family
    by_workers: LLM
    by_device: LLM
    loaded: list[tuple[bool, PixelPlan]]

    def prompt(self, *images: Any) -> Any:
        signs = self.family.signs(len(images))
        return {"prompt": f"USER: {signs}\nWhat is this? ASSISTANT:", "multi_modal_data": {"image": list(images)}}


def resizing(make: Callable[[], LLM], max_raw_pixels: int = MAX_RAW_PIXELS) -> LLM:
    """An engine that takes its device for one that resizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "most_raw_pixels", lambda device: max_raw_pixels)
        return make()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, PixelPlan]]:
    """Whether each picture came raw, and its plan, in the order in which loaders saw them."""
    seen: list[tuple[bool, PixelPlan]] = []
    load = PixelLoader.load

    def noted(loader: PixelLoader, pixels: Pixels, plan: PixelPlan, into: torch.Tensor | None = None) -> torch.Tensor:
        seen.append((pixels.is_raw, plan))
        return load(loader, pixels, plan, into)

    monkeypatch.setattr(PixelLoader, "load", noted)
    return seen


@pytest.fixture(params=NAMES)
def roads(request: pytest.FixtureRequest, tmp_path: Path, loaded: list[tuple[bool, PixelPlan]]) -> Iterator[Roads]:
    family = next(row for row in FAMILIES if row.name == request.param)
    folder = family.write(tmp_path, family.shapes[family.served[0]])

    def make() -> LLM:
        return LLM(str(folder), media_workers=0, **ALONE)

    with make() as by_workers, resizing(make) as by_device:
        loaded.clear()  # what was measured
        yield Roads(family, by_workers, by_device, loaded)
        assert_idle(by_device)


def features(llm: LLM) -> dict[bytes, torch.Tensor]:
    """What the tower made, by the pictures' keys."""
    core: Any = llm._front.engine.core  # type: ignore[attr-defined]
    stored = core.executor._runner.vision._features
    entries = core._scheduler._features._entries
    return {key: stored[entry.feature_id] for key, entry in entries.items() if entry.feature_id is not None}


def encoded(image: Image.Image, format: str, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif)
    return buffer.getvalue()


def test_engine_whose_device_resizes_answers_the_same_from_the_same_features(roads: Roads):
    glass = picture(9, 70, 44).convert("RGBA")
    glass.putalpha(picture(10, 70, 44).convert("L"))
    pictures: list[Any] = [
        *(picture(width + height, width, height) for sizes in roads.family.asked for width, height in sizes),
        encoded(picture(8, 90, 41), "JPEG", orientation=6),
        encoded(glass, "PNG"),
        glass,
        picture(11, 30, 20).convert("L"),
    ]
    prompts = [roads.prompt(image) for image in pictures] + [roads.prompt(*pictures[-2:])]
    expected = roads.by_workers.generate(prompts, GREEDY, use_tqdm=False)
    assert not any(is_raw for is_raw, _ in roads.loaded)
    roads.loaded.clear()
    got = roads.by_device.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in got] == [output.outputs[0].token_ids for output in expected]
    for is_raw, plan in roads.loaded:
        assert is_raw == (raw_plan(plan, MAX_RAW_PIXELS) is not None)
    assert sum(is_raw for is_raw, _ in roads.loaded) >= 5
    theirs, ours = features(roads.by_workers), features(roads.by_device)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_corrupt_picture_fails_alone_with_the_same_error_on_either_road(folder: Path):
    data = encoded(picture(1, 200, 150), "JPEG")
    prompts = [asked(1), asked(2) | {"multi_modal_data": {"image": data[: len(data) // 2]}}, asked(3)]
    errors: list[str] = []
    answers: list[Any] = []

    def make() -> LLM:
        return LLM(str(folder), media_workers=1)

    for llm in (make(), resizing(make)):
        with llm:
            with pytest.raises(MediaError) as caught:
                llm.generate(prompts, GREEDY, use_tqdm=False)
            errors.append(f"{caught.value.code}: {caught.value}")
            answers.append([o.outputs[0].token_ids for o in llm.generate(prompts[::2], GREEDY, use_tqdm=False)])
            assert_idle(llm)
    assert errors[0] == errors[1]
    assert "image_parse_error" in errors[0]
    assert answers[0] == answers[1]


def test_picture_above_the_limit_is_resized_by_the_workers(folder: Path, loaded: list[tuple[bool, PixelPlan]]):
    def make() -> LLM:
        return LLM(str(folder), media_workers=0)

    with resizing(make, max_raw_pixels=60 * 60) as llm:
        loaded.clear()
        images = [picture(1, 60, 60), picture(2, 61, 60), picture(3, 50, 40)]
        prompts = [asked(0) | {"multi_modal_data": {"image": image}} for image in images]
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert {(plan.width, plan.height): is_raw for is_raw, plan in loaded} == {
        (60, 60): True,
        (61, 60): False,
        (50, 40): True,
    }


def test_device_resizes_where_it_has_a_kernel_and_pillow_is_known(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def resample(picture_YX3: torch.Tensor, taps: torch.Tensor, axis: int, out_YX3: torch.Tensor) -> None: ...

    answers = [True, False]
    monkeypatch.setattr(build.PixelLoader, "makes_pillows_bytes", lambda loader: answers.pop(0))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert build.most_raw_pixels(cpu) == 0
    monkeypatch.setattr(build, "select", lambda device: reference.KERNELS)
    assert build.most_raw_pixels(cuda) == 0
    monkeypatch.setattr(build, "select", lambda device: dataclasses.replace(reference.KERNELS, resample=resample))
    assert build.most_raw_pixels(cuda) == MAX_RAW_PIXELS
    assert caplog.text == ""
    assert build.most_raw_pixels(cuda) == 0
    assert "Pictures are resized on the CPU" in caplog.text
