"""Videos made for tests: frames that differ, and PyAV to write them."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from PIL import Image


def frames(count: int, width: int = 64, height: int = 48, seed: int = 0) -> list[Image.Image]:
    """Smooth pictures, each unlike the others, which survive compression well enough to be told apart."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    made: list[Image.Image] = []
    for i in range(count):
        slopes = rng.uniform(-90, 90, (3, 2))
        base = np.array([40 + 170 * i / max(1, count - 1), 128, 210 - 170 * i / max(1, count - 1)])
        pixels = base + slopes[:, 0] * (x[..., None] - 0.5) + slopes[:, 1] * (y[..., None] - 0.3)
        made.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return made


def encode(
    pictures: Sequence[Image.Image],
    container: str = "mp4",
    codec: str = "mpeg4",
    fps: int = 10,
    rotation: int = 0,
    gop: int = 5,
) -> bytes:
    """A video file; ``rotation`` is what players turn it by, clockwise, and for mp4 alone."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=fps)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                output.mux(packet)
        for packet in stream.encode():
            output.mux(packet)
    data = buffer.getvalue()
    return rotated(data, rotation) if rotation else data


def decoded(data: bytes) -> list[Image.Image]:
    """Every frame, by PyAV alone, from first to last."""
    with av.open(io.BytesIO(data), "r") as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def rotated(mp4: bytes, degrees: int) -> bytes:
    """The same with another display matrix in its track header."""
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    a, b, c, d = (65536 * n for n in matrix)
    at = mp4.index(b"tkhd") + 4 + 40
    return mp4[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30) + mp4[at + 36 :]


def header_first(mp4: bytes) -> bytes:
    """The same with its index in front of the frames, as files for the web have it."""
    boxes: dict[bytes, bytes] = {}
    at = 0
    while at < len(mp4):
        size, name = struct.unpack(">I4s", mp4[at : at + 8])
        boxes[name] = mp4[at : at + size]
        at += size
    index = boxes[b"moov"]
    at = index.index(b"stco")
    (count,) = struct.unpack(">I", index[at + 8 : at + 12])
    offsets = struct.unpack(f">{count}I", index[at + 12 : at + 12 + 4 * count])
    moved = struct.pack(f">{count}I", *(offset + len(index) for offset in offsets))
    index = index[: at + 12] + moved + index[at + 12 + 4 * count :]
    return boxes[b"ftyp"] + index + b"".join(box for name, box in boxes.items() if name not in (b"ftyp", b"moov"))
