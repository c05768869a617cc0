"""Pictures for tests, made on the spot."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from opsin.types import PixelPlan, Resize, View


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise over a gradient; no two corners are alike."""
    rng = np.random.default_rng(width * 10_007 + height)
    ramp = np.add.outer(np.linspace(0, 150, height), np.linspace(0, 50, width))[:, :, None]
    pixels = (ramp + rng.integers(0, 56, (height, width, 4))).astype(np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def slow_png(edge: int) -> bytes:
    """A small file, ``edge`` x ``edge`` grey pixels, that takes a while to decode."""
    packer = zlib.compressobj(1)
    row = bytes([4]) + bytes(edge)  # Paeth, the filter that costs most
    rows = b"".join(packer.compress(row) for _ in range(edge)) + packer.flush()
    header = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def square_plan(size: tuple[int, int], edge: int = 32) -> PixelPlan:
    """Squash the whole picture into one tile."""
    return PixelPlan(width=size[0], height=size[1], views=(View(ops=(Resize(edge, edge),), height=edge, width=edge),))
