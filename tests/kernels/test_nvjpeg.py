"""The calls of nvJPEG, on a stand-in for the library: what is decoded, what is left to others, what is freed."""

from __future__ import annotations

import ctypes
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import ConfigError
from opsin.kernels import nvjpeg
from opsin.kernels.nvjpeg import Jpeg, JpegDecoder, load_library
from tests.kernels.nvjpeg_stand_in import StandIn

CPU = torch.device("cpu")


def jpeg(seed: int, width: int = 40, height: int = 24) -> Jpeg:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return Jpeg(buffer.getvalue(), width, height)


def pixels(jpeg: Jpeg) -> torch.Tensor:
    with Image.open(io.BytesIO(jpeg.data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def assert_decoded(decoder: JpegDecoder, jpegs: list[Jpeg], taken: list[bool]) -> None:
    made = decoder.decode(jpegs)
    assert [picture is not None for picture in made] == taken
    for one, picture in zip(jpegs, made, strict=True):
        assert picture is None or torch.equal(picture, pixels(one))


def test_pictures_of_several_sizes_are_decoded_in_one_batch():
    library = StandIn()
    decoder = JpegDecoder(library, CPU, None)
    assert_decoded(decoder, [jpeg(1), jpeg(2, 17, 90), jpeg(3, 1, 1)], [True] * 3)
    assert library.batches == [3]
    assert library.flags == {1 << 5}  # chroma as libjpeg makes it
    assert decoder.decode([]) == []


def test_state_is_made_ready_for_each_size_of_batch():
    library = StandIn()
    decoder = JpegDecoder(library, CPU, None)
    for size in (1, 1, 3, 2, 3):
        assert_decoded(decoder, [jpeg(seed) for seed in range(size)], [True] * size)
    assert library.batches == [1, 1, 3, 2, 3]


def test_damaged_picture_is_left_out_and_the_others_of_its_batch_come_all_the_same():
    bad = jpeg(2)
    library = StandIn(damaged=lambda data: data == bad.data)
    decoder = JpegDecoder(library, CPU, None)
    assert_decoded(decoder, [jpeg(1), bad, jpeg(3)], [True, False, True])
    assert library.batches == [3, 1, 1, 1]
    assert_decoded(decoder, [bad], [False])
    assert_decoded(decoder, [jpeg(1)], [True])


def test_picture_that_the_backend_does_not_take_is_in_no_batch():
    odd = jpeg(2)
    library = StandIn(refused=lambda data: data == odd.data)
    assert_decoded(JpegDecoder(library, CPU, None), [odd, jpeg(1)], [False, True])
    assert library.batches == [1]


def test_picture_of_another_size_than_there_is_room_for_is_never_written():
    library = StandIn()
    lies = [jpeg(1)._replace(width=39), jpeg(1)._replace(height=10), Jpeg(b"no picture", 8, 8)]
    assert_decoded(JpegDecoder(library, CPU, None), lies, [False] * 3)
    assert library.batches == []


def test_kernels_decode_where_there_is_no_hardware():
    library = StandIn(has_hardware=False)
    decoder = JpegDecoder(library, CPU, None)
    assert (decoder.backend, library.created) == ("gpu_hybrid", [3, 2])
    with pytest.raises(ConfigError, match=r"nvJPEG cannot be used here \(hardware: arch mismatch\)"):
        JpegDecoder(library, CPU, None, backends=["hardware"])


def test_closed_decoder_holds_nothing_and_may_be_closed_again():
    library = StandIn()
    decoder = JpegDecoder(library, CPU, None)
    assert len(library.open_handles) == 3
    decoder.close()
    decoder.close()
    assert not library.open_handles


@pytest.mark.parametrize(("cuda", "folder"), [("13.0", "cu13"), ("12.8", "nvjpeg")])
def test_library_is_found_where_the_wheel_puts_it(
    cuda: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name = f"libnvjpeg.so.{cuda.partition('.')[0]}"
    path = tmp_path / "nvidia" / folder / "lib" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    tried: list[str] = []

    def load(path: str) -> Any:
        tried.append(path)
        if len(tried) == 1:
            raise OSError("damaged")
        return "library"

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert load_library(cuda) == "library"
    assert tried == [str(path), name]  # or on the loader's path


@pytest.mark.parametrize(
    ("cuda", "told"),
    [
        ("13.0", r"libnvjpeg\.so\.13.* is not found.*pip install 'opsin\[nvjpeg\]'"),
        ("12.8", r"libnvjpeg\.so\.12.* is not found.*pip install nvidia-nvjpeg-cu12"),
        (None, "built for CUDA"),
    ],
)
def test_library_that_is_missing_is_told_with_what_to_do(cuda: str | None, told: str, monkeypatch: pytest.MonkeyPatch):
    def load(path: str) -> Any:
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(ConfigError, match=told):
        load_library(cuda)


def test_status_that_is_new_to_us_is_told_by_its_number():
    assert nvjpeg._said(3) == "bad JPEG"
    assert nvjpeg._said(99) == "status 99"


def test_every_name_of_the_interface_is_in_the_stand_in():
    library = StandIn()
    assert {name for name in vars(library) if name.startswith("nvjpeg")} == set(nvjpeg._PROTOTYPES)
