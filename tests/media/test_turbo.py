"""JPEGs by simplejpeg: Pillow's bytes, and Pillow itself for all that it does not take."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from opsin.config import MediaConfig
from opsin.errors import MediaError
from opsin.media import pool as pool_module
from opsin.media.decode import decode_rgb
from opsin.media.pool import MediaPool
from opsin.media.sniff import ImageHeader
from opsin.media.source import EncodedPicture, open_encoded
from opsin.media.turbo import Turbo, open_turbo
from opsin.types import PixelPlan, View

from .pictures import encode, photo

simplejpeg = pytest.importorskip("simplejpeg")


@pytest.fixture(scope="module")
def turbo() -> Turbo:
    opened = open_turbo()
    assert opened is not None, "it decodes otherwise than Pillow here"
    return opened


def opened(data: bytes) -> EncodedPicture:
    source = open_encoded(data, MediaConfig())
    assert isinstance(source, EncodedPicture)
    return source


def as_it_is(source: EncodedPicture) -> PixelPlan:
    width, height = source.size
    return PixelPlan(width, height, (View((), height=height, width=width),))


def rotated() -> bytes:
    exif = photo(40, 30).getexif()
    exif[0x0112] = 6
    return encode(photo(40, 30), "JPEG", exif=exif)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 3), (16, 16), (65, 129), (200, 133)])
def test_pixels_equal_pillows(turbo: Turbo, width: int, height: int, progressive: bool, subsampling: str):
    for mode, quality in (("RGB", 1), ("RGB", 75), ("RGB", 100), ("L", 90)):
        data = encode(
            photo(width, height).convert(mode), "JPEG", quality=quality, progressive=progressive,
            **({"subsampling": subsampling} if mode == "RGB" else {}),
        )  # fmt: skip
        source = opened(data)
        out = np.empty(width * height * 3, np.uint8)
        assert turbo.fill(data, source.header, out)
        assert np.array_equal(out, np.asarray(decode_rgb(data, source.header, "white")).reshape(-1))


@pytest.mark.parametrize(
    "data",
    [
        encode(photo(40, 30).convert("CMYK"), "JPEG"),
        encode(photo(40, 30), "JPEG")[:-40],
        rotated(),
        encode(photo(40, 30), "PNG"),
    ],
    ids=["cmyk", "cut-short", "rotated", "png"],
)
def test_what_is_not_a_whole_upright_jpeg_is_left_to_pillow(turbo: Turbo, data: bytes):
    source = opened(data)
    assert not turbo.fill(data, source.header, np.empty(source.num_pixels * 3, np.uint8))


@pytest.mark.parametrize(("width", "height"), [(39, 30), (40, 29), (30, 40), (41, 30), (80, 60)])
def test_jpeg_of_another_size_than_its_header_says_is_left_to_pillow(turbo: Turbo, width: int, height: int):
    out = np.full(2 * width * height * 3, 7, np.uint8)
    assert not turbo.fill(encode(photo(40, 30), "JPEG"), ImageHeader("JPEG", width, height), out[: width * height * 3])
    assert (out[width * height * 3 :] == 7).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_pool_makes_pillows_bytes_of_every_picture(workers: int):
    pictures = {
        "plain": encode(photo(120, 90), "JPEG"),
        "grey": encode(photo(50, 60, "L"), "JPEG"),
        "cmyk": encode(photo(40, 30).convert("CMYK"), "JPEG"),
        "rotated": rotated(),
        "png": encode(photo(33, 21)),
        "cut-short": encode(photo(64, 48), "JPEG")[:-60],
    }
    with MediaPool(MediaConfig(media_workers=workers)) as pool:
        done: dict[object, Any] = {}
        for name, data in pictures.items():
            source = opened(data)
            pool.submit(name, source, as_it_is(source))
        while len(done) < len(pictures):
            done |= {item.job_id: item for item in pool.wait(20)}
    assert isinstance(done["cut-short"].error, MediaError)
    assert done["cut-short"].error.code == "image_parse_error"
    for name in set(pictures) - {"cut-short"}:
        source = opened(pictures[name])
        assert np.array_equal(done[name].pixels, np.asarray(source.decode()).reshape(-1)), name


def test_pools_thread_asks_it_for_pictures_that_are_wanted_as_they_are(monkeypatch: pytest.MonkeyPatch):
    def sevens(data: Any, space: str, buffer: Any) -> Any:
        buffer[...] = 7
        return buffer

    monkeypatch.setattr(pool_module, "open_turbo", lambda: Turbo(simplejpeg.decode_jpeg_header, sevens))
    with MediaPool(MediaConfig(media_workers=0)) as pool:
        source = opened(encode(photo(12, 9), "JPEG"))
        pool.submit("raw", source, as_it_is(source))
        [finished] = pool.wait(20)
    assert finished.pixels is not None
    assert (finished.pixels == 7).all()


@pytest.mark.parametrize(
    "change",
    [lambda made: made[:, :, ::-1], lambda made: made[::-1], lambda made: np.clip(made.astype(int) + 1, 0, 255)],
    ids=["colours", "rows", "values"],
)
def test_decoder_with_other_bytes_than_pillows_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: Callable[[Any], Any]
):
    decode = simplejpeg.decode_jpeg

    def other(data: Any, space: str, buffer: Any) -> Any:
        made = decode(data, space, buffer=buffer)
        made[...] = change(made.copy())
        return made

    monkeypatch.setattr(simplejpeg, "decode_jpeg", other)
    assert open_turbo() is None
    assert "decoded by Pillow" in caplog.text


@pytest.mark.parametrize(
    ("error", "told"),
    [(ModuleNotFoundError("no simplejpeg"), False), (ValueError("numpy.dtype size changed"), True)],
    ids=["missing", "broken"],
)
def test_without_the_library_pillow_decodes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, told: bool
):
    find = importlib.import_module

    def failing(name: str, *args: Any) -> Any:
        if name == "simplejpeg":
            raise error
        return find(name, *args)

    monkeypatch.setattr(importlib, "import_module", failing)
    assert open_turbo() is None
    assert ("does not work here" in caplog.text) == told
