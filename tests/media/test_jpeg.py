"""Which JPEGs a GPU may decode: plain ones, whole, whatever has been done to the others."""

from __future__ import annotations

import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.media.jpeg import is_plain

WIDTH, HEIGHT = 83, 45


def jpeg(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), **settings: Any) -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def with_codes(name: int, counts: list[int], symbols: bytes) -> bytes:
    """With one more table of codes; those of the picture's own are defined behind it."""
    body = bytes([name, *counts]) + symbols
    return PLAIN[:2] + b"\xff\xc4" + (len(body) + 2).to_bytes(2, "big") + body + PLAIN[2:]


def is_plain_here(data: bytes) -> bool:
    return is_plain(data, WIDTH, HEIGHT)


PLAIN = jpeg()
ADOBE = b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0"  # and the transform


@pytest.mark.parametrize(
    "data",
    [
        *(jpeg(subsampling=subsampling) for subsampling in (0, 1, 2)),
        *(jpeg(quality=quality) for quality in (1, 100)),
        jpeg("L"),
        jpeg(optimize=True),
        jpeg(restart_marker_blocks=1),
        jpeg(restart_marker_blocks=5, subsampling=0),
        jpeg(restart_marker_rows=1),
        jpeg(comment=b"\xff\xd9 a picture's end"),
        jpeg(exif=Image.Exif()),
        jpeg(icc_profile=bytes(70_000)),
        PLAIN[:2] + ADOBE + b"\x01" + PLAIN[2:],
        PLAIN[:2] + PLAIN[20:],  # without JFIF's mark
    ],
)
def test_jpeg_as_libraries_write_them_is_plain(data: bytes) -> None:
    assert is_plain_here(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        jpeg(progressive=True),
        jpeg("CMYK"),
        jpeg(keep_rgb=True),
        jpeg(size=(WIDTH, HEIGHT + 1)),
        PLAIN + b"\0",
        PLAIN + PLAIN,
        PLAIN[:2] + b"\xff" + PLAIN[2:],  # a filler
        PLAIN[:2] + ADOBE + b"\x00" + PLAIN[2:],
        PLAIN.replace(b"\xff\xc0", b"\xff\xc1"),  # extended
        PLAIN.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),  # 12 bits
        PLAIN.replace(b"\x01\x22\x00", b"\x01\x12\x00"),  # 4:4:0
        PLAIN.replace(b"\x01\x22\x00", b"\x01\x41\x00"),  # 4:1:1
        PLAIN.replace(b"\x03\x11\x01", b"\x03\x11\x03"),  # a quantization table that is not there
        PLAIN.replace(b"\xff\xda\x00\x0c\x03\x01\x00", b"\xff\xda\x00\x0c\x03\x01\x22"),  # likewise codes
        PLAIN.replace(b"\x00\x3f\x00", b"\x00\x00\x00"),  # one scan of several
        PLAIN.replace(b"\xff\xc4\x00\x1f\x00\x00\x01", b"\xff\xc4\x00\x1f\x00\x03\x01"),  # more codes than there are
        with_codes(0x10, [0] * 8 + [255] * 8, bytes(range(255)) * 8),  # more than decoders have room for
        with_codes(0x11, [0] * 7 + [2] + [0] * 8, b"\x21\x21"),
        with_codes(0x10, [0] * 7 + [2] + [0] * 8, b"\x21\x2b"),  # a coefficient of 11 bits
        with_codes(0x00, [0] * 7 + [2] + [0] * 8, b"\x01\x0c"),  # a difference of 12
        PLAIN.replace(b"\xff\xc0", b"\xff\xdc"),
        PLAIN[:-2] + b"\xff\xd0" + PLAIN[-2:],  # a restart that nothing announces
        jpeg(restart_marker_blocks=2).replace(b"\xff\xd3", b"\xff\xd4", 1),
        jpeg(restart_marker_blocks=2).replace(b"\xff\xdd\x00\x04\x00\x02", b"\xff\xdd\x00\x04\x00\x03"),
    ],
)
def test_jpeg_of_any_other_form_is_not_plain(data: bytes) -> None:
    assert not is_plain_here(data)


def test_scan_of_nothing_but_markers_is_refused_at_the_first() -> None:
    begin = PLAIN.index(b"\xff\xda") + 14
    data = PLAIN[:begin] + 100_000 * b"\xff\xd0" + PLAIN[-2:]
    tracemalloc.start()
    try:
        assert not is_plain_here(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_changes_above_change_something() -> None:
    assert is_plain_here(with_codes(0x11, [0] * 7 + [2] + [0] * 8, b"\x21\x2a"))
    assert is_plain_here(with_codes(0x00, [0] * 7 + [2] + [0] * 8, b"\x01\x0b"))
    for marks in (
        *(b"\xff\xc0\x00\x11\x08", b"\x01\x22\x00", b"\x03\x11\x01", b"\xff\xda\x00\x0c\x03\x01\x00", b"\x00\x3f\x00"),
        b"\xff\xc4\x00\x1f\x00\x00\x01",
    ):
        assert PLAIN.count(marks) == 1, marks
    assert jpeg(restart_marker_blocks=2).count(b"\xff\xd3") >= 1


@pytest.mark.parametrize("data", [PLAIN, jpeg("L"), jpeg(restart_marker_blocks=1)])
def test_jpeg_cut_short_anywhere_is_not_plain(data: bytes) -> None:
    assert not any(is_plain_here(data[:end]) for end in range(len(data)))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.integers(0, len(PLAIN) - 1), st.binary(max_size=8), st.integers(0, 8))
def test_damaged_jpeg_that_is_plain_is_a_picture_to_pillow(at: int, inserted: bytes, num_removed: int) -> None:
    data = PLAIN[:at] + inserted + PLAIN[at + num_removed :]
    if is_plain_here(data):
        with Image.open(io.BytesIO(data)) as image:
            assert image.convert("RGB").size == (WIDTH, HEIGHT)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.binary(max_size=300))
def test_noise_behind_the_mark_is_not_plain(noise: bytes) -> None:
    assert not is_plain_here(b"\xff\xd8" + noise)
