"""Tiles made on the device from raw pictures: the bytes, and the places, of those that media workers make."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from opsin.kernels import reference
from opsin.layers import staging
from opsin.media.ops import make_frames, output_size
from opsin.media.raw import MAX_RAW_PIXELS, raw_plan
from opsin.models import resolve
from opsin.models.hub import find_model
from opsin.runner import pixels as module
from opsin.runner.executor import Pixels
from opsin.runner.pixels import PixelLoader
from opsin.types import Crop, Pad, PixelOp, PixelPlan, Resize, View
from tests.factories.families import FAMILIES

CPU = torch.device("cpu")


def noise(width: int, height: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(width * 10_007 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_workers(source: npt.NDArray[np.uint8], plan: PixelPlan) -> npt.NDArray[np.uint8]:
    out = np.empty(plan.num_bytes, np.uint8)
    make_frames([Image.fromarray(source)], plan, out)
    return out


def by_device(loader: PixelLoader, source: npt.NDArray[np.uint8], plan: PixelPlan) -> npt.NDArray[np.uint8]:
    return loader.load(Pixels(source.reshape(-1), is_raw=True), plan).numpy()


def view(ops: tuple[PixelOp, ...], width: int, height: int, rows: int = 1, cols: int = 1) -> View:
    """Of a picture of this size, whose sides after ``ops`` are multiples of ``rows`` and ``cols``."""
    made_width, made_height = output_size(ops, width, height)
    return View(ops, height=made_height // rows, width=made_width // cols, rows=rows, cols=cols)


FILL = st.tuples(*[st.integers(0, 255)] * 3)
SIDE, BORDER = st.integers(1, 40), st.integers(0, 9)
NAMES: list[Literal["bilinear", "bicubic", "lanczos"]] = ["bilinear", "bicubic", "lanczos"]
OPS = st.lists(
    st.one_of(
        st.builds(Resize, SIDE, SIDE, st.sampled_from(NAMES)),
        st.builds(Crop, st.integers(-20, 20), st.integers(-20, 20), SIDE, SIDE, FILL),
        st.builds(Pad, BORDER, BORDER, BORDER, BORDER, FILL),
    ),
    max_size=4,
)


@st.composite
def plans(draw: st.DrawFn) -> PixelPlan:
    width, height = draw(SIDE), draw(SIDE)
    views: list[View] = []
    for _ in range(draw(st.integers(1, 3))):
        ops = draw(OPS)
        rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        if rows * cols > 1:
            ops.append(Resize(cols * draw(st.integers(1, 20)), rows * draw(st.integers(1, 20))))
        views.append(view(tuple(ops), width, height, rows, cols))
    return PixelPlan(width, height, tuple(views), frames=(0,) * draw(st.integers(1, 2)))


@settings(deadline=None, derandomize=True, max_examples=120)
@given(plans())
def test_tiles_of_any_plan_are_those_of_media_workers(plan: PixelPlan):
    source = noise(plan.width, plan.height)
    loader = PixelLoader(reference.resample, CPU)
    np.testing.assert_array_equal(by_device(loader, source, plan), by_workers(source, plan))


def test_picture_that_the_device_has_decoded_is_resized_where_it_is():
    plan = PixelPlan(40, 30, (View((Resize(28, 14),), height=14, width=28),))
    source = noise(40, 30)
    loader = PixelLoader(reference.resample, CPU)
    place = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    made = loader.load(Pixels(torch.from_numpy(source.copy()), is_raw=True), plan, place)
    assert made.data_ptr() == place.data_ptr()
    np.testing.assert_array_equal(made.numpy(), by_workers(source, plan))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tiles_of_every_family_are_those_of_media_workers(family: Any, tmp_path: Path):
    folder = family.write(tmp_path, family.shapes[family.towers[0]])
    files = find_model(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rule = resolve(files.config).load_rule().from_hf(files.config, files.processor, tokenizer)
    loader = PixelLoader(reference.resample, CPU)
    num_raw = 0
    for width, height in [*(size for sizes in family.asked for size in sizes), *family.sizes]:
        plan = rule.layout("image", width, height, 1, {}).plan
        if raw_plan(plan, MAX_RAW_PIXELS) is None:
            continue
        source = noise(width, height)
        np.testing.assert_array_equal(by_device(loader, source, plan), by_workers(source, plan))
        num_raw += 1
    assert num_raw > 2


def test_tiles_from_workers_are_only_brought_over():
    plan = PixelPlan(5, 4, (View((Resize(3, 3),), 3, 3),))
    tiles = np.arange(27, dtype=np.uint8)
    loader = PixelLoader(reference.resample, CPU)
    place = torch.zeros(27, dtype=torch.uint8)
    for given_place in (None, place):
        assert loader.load(Pixels(tiles), plan, given_place).tolist() == list(range(27))
    assert place.tolist() == list(range(27))


def test_picture_that_is_resized_to_one_tile_takes_one_upload_and_two_passes(monkeypatch: pytest.MonkeyPatch):
    uploads: list[int] = []

    def counted(arrays: Any, device: torch.device, into: torch.Tensor | None = None) -> list[torch.Tensor]:
        uploads.append(staging.num_bytes(arrays))
        return staging.upload(arrays, device, into)

    written: list[int] = []

    def resample(picture_YX3: torch.Tensor, taps: torch.Tensor, axis: int, out_YX3: torch.Tensor) -> None:
        written.append(out_YX3.data_ptr())
        reference.resample(picture_YX3, taps, axis, out_YX3)

    monkeypatch.setattr(module, "upload", counted)
    plan = PixelPlan(100, 80, (view((Resize(112, 84),), 100, 80),))
    place = torch.empty(plan.num_bytes, dtype=torch.uint8)
    source = noise(100, 80)
    PixelLoader(resample, CPU).load(Pixels(source.reshape(-1), is_raw=True), plan, place)
    np.testing.assert_array_equal(place.numpy(), by_workers(source, plan))
    assert len(written) == 2
    assert written[-1] == place.data_ptr()
    table_bytes = 4 * math.ceil(2 * 2 + 2) * (112 + 84)
    assert len(uploads) == 1
    assert source.size < uploads[0] < source.size + table_bytes + 64


def test_tables_of_weights_are_kept_and_few(monkeypatch: pytest.MonkeyPatch):
    made: list[tuple[Any, ...]] = []
    make_taps = module.make_taps

    def noted(*sizes: Any) -> npt.NDArray[np.int32]:
        made.append(sizes)
        return make_taps(*sizes)

    monkeypatch.setattr(module, "make_taps", noted)
    monkeypatch.setattr(module, "_MAX_TABLES", 4)
    loader = PixelLoader(reference.resample, CPU)

    def load(edge: int) -> None:
        by_device(loader, noise(20, 30), PixelPlan(20, 30, (view((Resize(edge, edge),), 20, 30),)))

    load(9)
    load(9)
    assert len(made) == 2
    for edge in range(10, 14):
        load(edge)
    assert len(made) == 10
    assert len(loader._tables) == 4
    load(13)
    assert len(made) == 10
    load(9)
    assert len(made) == 12


def test_pillow_or_a_device_that_resizes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_off(picture_YX3: torch.Tensor, taps: torch.Tensor, axis: int, out_YX3: torch.Tensor) -> None:
        reference.resample(picture_YX3, taps, axis, out_YX3)
        out_YX3[-1, -1, -1] ^= 1

    loader = PixelLoader(reference.resample, CPU)
    assert loader.makes_pillows_bytes()
    assert not PixelLoader(one_off, CPU).makes_pillows_bytes()
    resize = Image.Image.resize

    def another(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
        return resize(image, size, resampling).rotate(180)

    monkeypatch.setattr(Image.Image, "resize", another)
    assert not loader.makes_pillows_bytes()
