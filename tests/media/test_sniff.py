"""Headers of plain JPEGs are read without Pillow, and say what Pillow says."""

from __future__ import annotations

import io
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.errors import MediaError
from opsin.media import sniff
from opsin.media.sniff import ImageHeader, read_header

PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (45, 83, 3), dtype=np.uint8))


def jpeg(mode: str = "RGB", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    PICTURE.convert(mode).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


PLAIN = jpeg()
SCAN = PLAIN.index(b"\xff\xda")
FRAME = PLAIN.index(b"\xff\xc0")


def said(data: bytes) -> ImageHeader | tuple[str | None, str]:
    """Of a picture's header, or what is wrong with it."""
    try:
        return read_header(data, max_pixels=2**24, max_bytes=2**20)
    except MediaError as error:
        return error.code, str(error)


def said_by_pillow(data: bytes) -> ImageHeader | tuple[str | None, str]:
    with mock.patch.object(sniff, "plain_jpeg_size", return_value=None):
        return said(data)


@pytest.mark.parametrize(
    "data",
    [PLAIN, jpeg("L"), jpeg(progressive=True), jpeg(quality=100, subsampling=0), jpeg(optimize=True, dpi=(72, 72))],
    ids=["plain", "grey", "progressive", "fine", "optimised"],
)
def test_jpeg_as_libraries_write_it_is_read_without_pillow(data: bytes):
    with mock.patch.object(sniff, "open_lazily", side_effect=AssertionError("Pillow was asked")):
        assert said(data) == ImageHeader("JPEG", 83, 45)
    assert said_by_pillow(data) == ImageHeader("JPEG", 83, 45)


@pytest.mark.parametrize(
    "data",
    [
        jpeg("CMYK"),
        jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
        jpeg(comment=b"a comment"),
        PLAIN[:SCAN] + segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="8"/>') + PLAIN[SCAN:],
        PLAIN[:FRAME] + b"\xff" + PLAIN[FRAME:],
        PLAIN[:FRAME] + b"junk" + PLAIN[FRAME:],
        PLAIN[:FRAME] + PLAIN[FRAME : FRAME + 19].replace(b"\x00\x2d\x00\x53", b"\x00\x20\x00\x20") + PLAIN[FRAME:],
        PLAIN[:2] + segment(0xC4, b"") * 40 + PLAIN[2:],
        PLAIN[: SCAN + 5],
        PLAIN[:FRAME],
        PLAIN[:3],
        PLAIN.replace(b"\x00\x2d\x00\x53", b"\x00\x00\x00\x53"),
        PLAIN.replace(b"\x08\x00\x2d\x00\x53", b"\x0c\x00\x2d\x00\x53"),
        PLAIN.replace(b"\x00\x2d\x00\x53", b"\xff\xff\xff\xff"),
    ],
    ids=lambda data: str(len(data)),
)
def test_jpeg_of_another_form_is_what_pillow_says(data: bytes):
    assert said(data) == said_by_pillow(data)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(3, SCAN + 12), st.integers(0, 255)), min_size=1, max_size=3), st.booleans())
def test_damaged_jpeg_is_what_pillow_says(changes: list[tuple[int, int]], is_cut: bool):
    data = bytearray(PLAIN)
    for at, value in changes:
        data[at] = value
    damaged = bytes(data[: changes[0][0]] if is_cut else data)
    assert said(damaged) == said_by_pillow(damaged)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(range(8)), max_size=10))
def test_jpeg_of_segments_in_any_order_is_what_pillow_says(order: list[int]):
    pieces = [
        segment(0xE0, b"JFIF\0" + bytes(9)),
        segment(0xE0, b"JFIF\0"),
        segment(0xDB, b"\x01" + bytes(64)),
        segment(0xDB, b"\x21" + bytes(64)),
        segment(0xC0, b"\x08\0\x10\0\x20\x01\x01\x11\0"),
        segment(0xC2, b"\x08\0\x11\0\x21\x03\x01\x22\0\x02\x11\1\x03\x11\1"),
        segment(0xDD, b"\0\x08"),
        segment(0xDA, b"\x01\x01\0\0\x3f\0"),
    ]
    data = b"\xff\xd8" + b"".join(pieces[i] for i in order) + b"\xff\xd9"
    assert said(data) == said_by_pillow(data)
