"""Pictures resized on the device: Pillow's bytes, from a kernel that is compiled once for all sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.engine import build
from opsin.kernels import select
from opsin.media.ops import make_frames
from opsin.runner.executor import Pixels
from opsin.runner.pixels import PixelLoader
from opsin.types import Crop, Pad, PixelOp, PixelPlan, Resize, View
from tests.engine.conftest import picture
from tests.factories.families import FAMILIES
from tests.factories.family import Family
from tests.gpu.waiting import waiting_refused

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
NAMES: list[Literal["bilinear", "bicubic", "lanczos"]] = ["bilinear", "bicubic", "lanczos"]
SIZES = [
    *((1024, 768, 1036, 756), (640, 480, 644, 476), (3264, 2448, 336, 336), (500, 375, 980, 735), (7, 1036, 3, 656)),
    *((1, 1, 28, 28), (1, 700, 30, 2), (700, 1, 2, 30), (16384, 3, 40, 9), (3, 16384, 9, 40), (336, 336, 336, 300)),
]


@pytest.fixture(scope="module")
def loader() -> PixelLoader:
    return PixelLoader(select(CUDA, "triton").resample, CUDA)


def noise(width: int, height: int) -> npt.NDArray[np.uint8]:
    values = np.random.default_rng(width * 10_007 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    values[height // 2 :] = np.where(values[height // 2 :] < 128, 0, 255)  # what negative weights take out of range
    return values


def assert_pillows(loader: PixelLoader, width: int, height: int, views: Sequence[View], num_frames: int = 1) -> None:
    plan = PixelPlan(width, height, tuple(views), (0,) * num_frames)
    source, expected = noise(width, height), np.empty(plan.num_bytes, np.uint8)
    make_frames([Image.fromarray(source)], plan, expected)
    got = loader.load(Pixels(source.reshape(-1), is_raw=True), plan)
    assert torch.equal(got.cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_resized_pixels_are_pillows(
    loader: PixelLoader, sizes: tuple[int, int, int, int], name: Literal["bilinear", "bicubic", "lanczos"]
):
    width, height, new_width, new_height = sizes
    view = View((Resize(new_width, new_height, name),), height=new_height, width=new_width)
    assert_pillows(loader, width, height, [view])


def test_random_sizes_are_pillows_and_compile_nothing_new(loader: PixelLoader):
    from opsin.kernels.triton.resample import _resample_kernel

    random = np.random.default_rng(1)
    compiled: set[int] = set()
    for i in range(120):
        width, height, new_width, new_height = (int(side) for side in random.integers(1, 1100, 4))
        op = Resize(new_width, new_height, NAMES[i % 3])
        assert_pillows(loader, width, height, [View((op,), height=new_height, width=new_width)])
        kernels: Any = _resample_kernel
        compiled.add(len(kernels.device_caches[torch.cuda.current_device()][0]))
    assert max(compiled) == 2  # down, and across


def test_views_windows_borders_and_tiles_lie_where_workers_put_them(loader: PixelLoader):
    ops: list[tuple[tuple[PixelOp, ...], int, int]] = [
        ((Resize(600, 400), Crop(10, 20, 560, 360)), 2, 2),
        ((Crop(31, 17, 333, 222), Resize(300, 200, "bilinear")), 1, 1),
        ((Resize(333, 300, "lanczos"), Pad(13, 5, 14, 7, (1, 2, 3))), 3, 2),
        ((Crop(-7, -9, 900, 700, (9, 8, 7)), Resize(91, 77), Resize(112, 112)), 1, 1),
        ((), 1, 1),
    ]
    sides = [(560, 360), (300, 200), (360, 312), (112, 112), (640, 480)]
    views = [
        View(done, height=height // rows, width=width // cols, rows=rows, cols=cols)
        for (done, rows, cols), (width, height) in zip(ops, sides, strict=True)
    ]
    assert_pillows(loader, 640, 480, views, num_frames=2)


def test_pictures_are_loaded_without_waiting_for_the_device(loader: PixelLoader):
    view = View((Resize(112, 84), Pad(0, 14, 0, 14)), height=56, width=56, rows=2, cols=2)
    plan = PixelPlan(100, 80, (view,))
    raw, tiles = Pixels(noise(100, 80).reshape(-1), is_raw=True), Pixels(np.zeros(plan.num_bytes, np.uint8))
    place = torch.empty(plan.num_bytes, dtype=torch.uint8, device=CUDA)
    loader.load(raw, plan)  # compiles
    with waiting_refused():
        for pixels in (raw, tiles):
            for into in (None, place):
                loader.load(pixels, plan, into)


def test_start_check_finds_pillows_bytes(loader: PixelLoader):
    assert loader.makes_pillows_bytes()


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_next", "internvl", "phi3_v"])
def test_engine_answers_the_same_whether_device_or_workers_resize(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    family: Family = next(row for row in FAMILIES if row.name == name)
    folder = family.write(tmp_path, family.shapes[family.served[0]])
    loaded: list[bool] = []
    load = PixelLoader.load

    def noted(loader: PixelLoader, pixels: Pixels, plan: PixelPlan, into: torch.Tensor | None = None) -> torch.Tensor:
        loaded.append(pixels.is_raw)
        return load(loader, pixels, plan, into)

    monkeypatch.setattr(PixelLoader, "load", noted)
    prompts: list[Any] = [
        {
            "prompt": f"USER: {family.signs(1)}\nWhat is this? ASSISTANT:",
            "multi_modal_data": {"image": picture(seed, width, height)},
        }
        for seed, (width, height) in enumerate(
            [(90, 60), (200, 33), (90, 60), (90, 60), (200, 33), (90, 60), (300, 200)]
        )
    ]

    def answers() -> list[list[int]]:
        with LLM(str(folder), dtype="float32", max_num_batched_patches=1, kv_cache_memory_bytes=2**26) as llm:
            loaded.clear()  # what was measured
            return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]

    by_device = answers()
    assert all(loaded)
    assert len(loaded) >= len(prompts)
    monkeypatch.setattr(build, "most_raw_pixels", lambda device: 0)
    assert answers() == by_device
    assert not any(loaded)
