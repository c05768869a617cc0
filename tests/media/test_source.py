"""What is let in, what it is taken for, and the codes of what is not."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import BmpImagePlugin, Image, ImageOps

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestError
from opsin.media.clips import FrameChoice
from opsin.media.decode import decode_rgb
from opsin.media.source import EncodedPicture, open_picture, read_regular_file
from opsin.media.wire import Job, carry_out
from opsin.types import PixelPlan

from .pictures import encode, photo, png_chunk

CONFIG = MediaConfig()
PNG = b"\x89PNG\r\n\x1a\n"


def with_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def bomb_png(width: int, height: int) -> bytes:
    """Header and compressed zeros; a few kilobytes that claim any size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return PNG + header + png_chunk(b"IDAT", zlib.compress(bytes(100_000))) + png_chunk(b"IEND", b"")


def code_of(picture: Any, config: MediaConfig = CONFIG) -> str | None:
    """The code that opening, or else decoding, fails with."""
    with pytest.raises(MediaError) as caught:
        open_picture(picture, config).decode()
    assert " at 0x" not in str(caught.value), "a message that shows an address"
    assert "PIL." not in str(caught.value).replace("PIL.Image", "")
    return caught.value.code


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"])
def test_encoded_picture_decodes_as_pillow_does(format: str) -> None:
    data = encode(photo(37, 23), format)
    source = open_picture(data, CONFIG)
    assert isinstance(source, EncodedPicture)
    assert (source.header.format, source.size) == (format, (37, 23))
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(source.decode()), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "TIFF"])
def test_exif_orientation_is_applied_to_encoded_pictures(format: str, orientation: int) -> None:
    data = encode(photo(37, 23), format, exif=with_exif(orientation))
    source = open_picture(data, CONFIG)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert source.size == expected.size
    np.testing.assert_array_equal(np.asarray(source.decode()), np.asarray(expected))


def test_png_orientation_behind_the_pixels_is_seen_in_the_header() -> None:
    data = encode(photo(37, 23))
    exif = png_chunk(b"eXIf", with_exif(6).removeprefix(b"Exif\0\0"))
    end = png_chunk(b"IEND", b"")
    source = open_picture(data.removesuffix(end) + exif + end, CONFIG)
    assert source.size == source.decode().size == (23, 37)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0", with_exif(9), with_exif(0)])
def test_broken_orientation_counts_as_upright(exif: bytes) -> None:
    assert open_picture(encode(photo(37, 23), "JPEG", exif=exif), CONFIG).size == (37, 23)


def test_pillow_pictures_are_taken_as_they_are() -> None:
    data = encode(photo(37, 23), "JPEG", exif=with_exif(6))
    assert open_picture(Image.open(io.BytesIO(data)), CONFIG).size == (37, 23)
    assert open_picture(data, CONFIG).size == (23, 37)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WebP"])
def test_first_frame_of_an_animation_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
    pixels = np.asarray(open_picture(data, CONFIG).decode())
    assert pixels.shape == (6, 8, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 16


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_white_or_dropped(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (1, 1))
        image.putpalette([10, 10, 10] * 256)
        image.info["transparency"] = b"\0" * 256
    elif mode == "PA":
        image = Image.new("RGBA", (1, 1), (10, 10, 10, 0)).convert("PA")
    else:
        image = Image.new(mode, (1, 1), (10, 10, 10, 0) if mode == "RGBA" else (10, 0))
    dropped = open_picture(image, MediaConfig(image_alpha="drop")).decode()
    assert dropped.getpixel((0, 0)) == image.convert("RGBA").getpixel((0, 0))[:3]  # type: ignore[index]
    assert open_picture(image, CONFIG).decode().getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["pillow", "array", "bytes", "worker"])
def test_transparency_shows_the_background_that_was_asked_for(form: str) -> None:
    image = Image.new("RGBA", (1, 1), (10, 10, 10, 51))  # a fifth of it shows
    config = MediaConfig(media_io_kwargs={"image": {"rgba_background_color": [0, 100, 200]}}, image_alpha="drop")
    picture: Any = {"pillow": image, "array": np.asarray(image)}.get(form, encode(image))
    source = open_picture(picture, config)
    if form == "worker":
        assert isinstance(source, EncodedPicture)
        job = msgspec.msgpack.decode(
            msgspec.msgpack.encode(Job(PixelPlan(1, 1, ()), source.header, None, source.alpha, 1)), type=Job
        )
        assert decode_rgb(source.data, source.header, job.alpha).getpixel((0, 0)) == (2, 82, 162)
    else:
        assert source.decode().getpixel((0, 0)) == (2, 82, 162)
    assert open_picture(photo(4, 4), config).decode().tobytes() == photo(4, 4).tobytes()


@pytest.mark.parametrize("colour", ["black", [0, 0], [0, 0, 256], [0, 0, 0.5], 7])
def test_background_that_is_no_colour_is_refused(colour: Any) -> None:
    with pytest.raises(RequestError, match="rgba_background_color"):
        FrameChoice.of({"image": {"rgba_background_color": colour}})


def test_background_is_the_engines_not_a_requests() -> None:
    settings = {"image": {"rgba_background_color": [0, 0, 0]}}
    assert FrameChoice.of(settings, {"video": {"num_frames": 3}}).num_frames == 3
    with pytest.raises(RequestError, match="a request has no settings for pictures"):
        FrameChoice.of({}, settings)


def test_path_bytes_and_str_share_one_digest(tmp_path: Path) -> None:
    data = encode(photo(8, 8))
    path = tmp_path / "picture.jpg"  # a name that lies
    path.write_bytes(data)
    assert len({open_picture(form, CONFIG).digest for form in (data, bytearray(data), path, str(path))}) == 1


def test_digests_of_different_pictures_with_equal_bytes_differ() -> None:
    flat = np.arange(48, dtype=np.uint8)
    palette = Image.frombytes("P", (4, 4), bytes(range(16)))
    palette.putpalette(list(range(256)) * 3)
    other_palette = palette.copy()
    other_palette.putpalette(list(range(255, -1, -1)) * 3)
    keyed = palette.copy()
    keyed.info["transparency"] = 3
    pictures = [
        flat.reshape(4, 4, 3),
        flat.reshape(2, 8, 3),
        flat.reshape(8, 2, 3),
        flat.reshape(4, 12),
        flat.reshape(12, 4),
        flat.reshape(12, 4, 1),
        flat.reshape(4, 3, 4),
        Image.frombytes("RGB", (4, 4), flat.tobytes()),
        Image.frombytes("RGB", (8, 2), flat.tobytes()),
        Image.frombytes("L", (12, 4), flat.tobytes()),
        Image.frombytes("YCbCr", (4, 4), flat.tobytes()),
        Image.frombytes("RGBA", (3, 4), flat.tobytes()),
        Image.frombytes("CMYK", (3, 4), flat.tobytes()),
        palette,
        other_palette,
        keyed,
        Image.frombytes("L", (4, 4), bytes(range(16))),
    ]
    digests = [open_picture(picture, CONFIG).digest for picture in pictures]
    assert len(set(digests)) == len(pictures)
    assert {len(digest) for digest in digests} == {32}


def test_digest_of_a_strided_array_is_that_of_its_values() -> None:
    array = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)[::2, ::-1]
    assert open_picture(array, CONFIG).digest == open_picture(array.copy(), CONFIG).digest
    np.testing.assert_array_equal(np.asarray(open_picture(array, CONFIG).decode()), array)


@pytest.mark.parametrize(
    ("picture", "code"),
    [
        (b"", "empty_image_file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image_format"),
        (b"%PDF-1.7\n", "invalid_image_format"),
        (b"8BPS\0\1", "invalid_image_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "invalid_image_format"),
        (b"SIMPLE  =                    T", "invalid_image_format"),
        (b"<!DOCTYPE html><html>", "invalid_image_format"),
        (b"\0\0\1\0\1\0", "invalid_image_format"),  # ICO
        (b"\0\0\0\x0cjP  \r\n\x87\n", "invalid_image_format"),  # JPEG 2000
        (b"\xff\xd8\xff", "image_parse_error"),
        (PNG, "image_parse_error"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "image_parse_error"),
        (b"GIF89a", "image_parse_error"),
        (b"BM", "image_parse_error"),
        (b"II*\0\x08\0\0\0", "image_parse_error"),
        (bomb_png(0, 5), "image_parse_error"),
        (bomb_png(100_000, 100_000), "image_too_large"),
        (encode(photo(60, 40), "JPEG")[:-500], "image_parse_error"),
        (encode(photo(60, 40))[:-500], "image_parse_error"),
        (bomb_png(4000, 4000), "image_parse_error"),  # pixels missing
        (np.zeros((4, 4, 3), np.float32), "invalid_image_format"),
        (np.zeros((3, 8, 9), np.uint8), "invalid_image_format"),
        (np.zeros((2, 4, 4, 3), np.uint8), "invalid_image_format"),
        (np.zeros((0, 4, 3), np.uint8), "image_parse_error"),
        (Image.new("La", (2, 2)), "invalid_image_format"),
        (Image.new("RGB", (0, 2)), "image_parse_error"),
        (12, "invalid_image_format"),
        (None, "invalid_image_format"),
        ("/nowhere/at/all.png", "invalid_image_url"),
        ("/", "invalid_image_url"),
        ("a\0b", "invalid_image_url"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:24],
)
def test_bad_picture_fails_with_code(picture: Any, code: str) -> None:
    assert code_of(picture) == code


@pytest.mark.parametrize(
    ("data", "likely"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, as phones make it"),
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "AVIF"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video"),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000"),
        (b"%PDF-1.7\n", "a PDF"),
        (b'<?xml version="1.0"?>\n<svg width="4">', "SVG"),
        (b"\n<!DOCTYPE html><title>404</title>", "a web page"),
        (b"iVBORw0KGgoAAAANSUhEUg", "base64 text that was not decoded"),
        (b"data:image/jpeg;base64,/9j/4AAQ", "base64 text that was not decoded"),
        (b"junk", None),
    ],
)
def test_what_is_taken_for_a_picture_is_told_by_its_name(data: bytes, likely: str | None) -> None:
    with pytest.raises(MediaError) as caught:
        open_picture(data, CONFIG)
    assert str(caught.value).endswith(f"; it looks like {likely}." if likely else "TIFF).")


def test_errors_of_a_path_name_it_and_urls_are_known_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    for path, words in (
        (tmp_path / "cat.jpg", ("No such file", "cat.jpg'.")),
        (str(tmp_path / "notes.txt"), ("not a picture", "notes.txt'.")),
        ("https://example.com/cat.jpg", ("'https://example.com/cat.jpg', a URL: give those to chat",)),
        ("data:image/png;base64," + "A" * 10_000, ("a URL: give those to chat",)),
    ):
        with pytest.raises(MediaError) as caught:
            open_picture(path, CONFIG)
        assert all(word in str(caught.value) for word in words)
        assert len(str(caught.value)) < 500
        assert caught.value.code in ("invalid_image_url", "invalid_image_format")


def test_limits_are_checked_before_anything_is_parsed_or_decoded(tmp_path: Path) -> None:
    data = encode(photo(20, 20))
    path = tmp_path / "p.png"
    path.write_bytes(data)
    few_bytes, few_pixels = MediaConfig(max_media_bytes=len(data) - 1), MediaConfig(max_image_pixels=399)
    assert code_of(data, few_bytes) == code_of(path, few_bytes) == "image_file_too_large"
    for picture in (data, path, photo(20, 20), np.zeros((20, 20, 3), np.uint8)):
        assert code_of(picture, few_pixels) == "image_too_large"
    assert open_picture(data, MediaConfig(max_media_bytes=len(data), max_image_pixels=400)).size == (20, 20)


@pytest.mark.parametrize(("edge", "expected"), [(20_000, "image_too_large"), (13_000, "(13000, 13000)")])
def test_header_of_a_huge_picture_costs_no_memory(edge: int, expected: str) -> None:
    program = f"""
import resource, sys
sys.path[:] = {sys.path!r}
from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestError
from opsin.media.clips import FrameChoice
from opsin.media.decode import decode_rgb
from opsin.media.source import open_picture
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(open_picture(data, MediaConfig()).size)
except MediaError as error:
    print(error.code)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], input=bomb_png(edge, edge), capture_output=True, check=True)
    answer, kib = done.stdout.decode().splitlines()
    assert answer == expected
    assert int(kib) < 20 * 1024


JPEG = encode(photo(24, 16), "JPEG")
SHORT_PNG = encode(photo(24, 16))
SEGMENT = b"\xff\xe1\xff\xff" + bytes(65533)


@pytest.mark.parametrize(
    ("data", "is_read"),
    [
        (JPEG[:2] + b"\xff" * 10_000 + JPEG[2:], True),
        (JPEG[:2] + b"\xff" * 30_000 + JPEG[2:], False),
        (JPEG[:2] + b"\xff\xfe\0\2" * 15_000 + JPEG[2:], False),
        (SHORT_PNG[:33] + png_chunk(b"tEXt", b"a\0b") * 1000 + SHORT_PNG[33:], True),
        (SHORT_PNG[:33] + png_chunk(b"tEXt", b"a\0b") * 15_000 + SHORT_PNG[33:], False),
        (JPEG[:2] + SEGMENT * 64 + JPEG[2:], True),
        (JPEG[:2] + SEGMENT * 130 + JPEG[2:], False),
    ],
    ids=["fillers", "many fillers", "comments", "texts", "many texts", "megabytes", "many megabytes"],
)
def test_header_is_read_up_to_a_length_that_takes_no_time(data: bytes, is_read: bool) -> None:
    if is_read:
        assert open_picture(data, CONFIG).decode().size == (24, 16)
    else:
        assert code_of(data) == "image_parse_error"


def test_picture_of_many_pieces_is_read_to_its_end() -> None:
    image = photo(400, 300)
    plain = encode(image)
    data, at = plain[:33], 33
    while at < len(plain):  # the same picture, its pixels in pieces of 10 bytes each
        length = int.from_bytes(plain[at : at + 4], "big")
        body = plain[at + 8 : at + 8 + length]
        kind = plain[at + 4 : at + 8]
        data += b"".join(png_chunk(kind, body[i : i + 10]) for i in range(0, len(body), 10)) or png_chunk(kind, body)
        at += 12 + length
    assert len(data) > 2 * len(plain)
    assert np.array_equal(np.asarray(open_picture(data, CONFIG).decode()), np.asarray(image))


def test_file_swapped_for_a_link_after_the_check_is_refused(tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "allowed" / "x").symlink_to(tmp_path / "secret")
    with pytest.raises(MediaError, match="leads out of the allowed folder"):
        read_regular_file(tmp_path / "allowed" / "x", 100, beneath=tmp_path / "allowed")


def test_lack_of_memory_is_not_blamed_on_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise MemoryError

    source = open_picture(encode(photo(8, 8), "BMP"), CONFIG)
    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", load)
    plan = PixelPlan(width=8, height=8, views=())
    assert carry_out(lambda: source.frames([0]), plan, np.empty(0, np.uint8)).code == "image_too_large"


def test_mutated_pictures_decode_or_fail_with_a_code() -> None:
    rng = np.random.default_rng(0)
    codes: set[str | None] = set()
    for format in ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"):
        data = encode(photo(24, 16), format)
        for _ in range(200):
            mutant = bytearray(data)
            for position in rng.integers(0, len(data), 3):
                mutant[position] = rng.integers(256)
            try:
                open_picture(mutant, MediaConfig(max_image_pixels=10_000)).decode()
            except MediaError as error:
                codes.add(error.code)
    assert codes <= {"image_parse_error", "image_too_large", "invalid_image_format"}
    assert "image_parse_error" in codes


def test_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert code_of(path) == "invalid_image_url"


def test_lazily_opened_picture_can_be_opened_from_many_threads_at_once(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8))
    picture.save(tmp_path / "shared.png")
    with ThreadPoolExecutor(8) as threads, Image.open(tmp_path / "shared.png") as lazy:
        together = threading.Barrier(8)

        def open_it(_: int) -> bytes:
            together.wait()
            return open_picture(lazy, CONFIG).digest

        digests = set(threads.map(open_it, range(8)))
    assert digests == {open_picture(picture, CONFIG).digest}
