"""Photo-like pictures from a seed, for measurements: their JPEGs weigh and decode like a camera's."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw


def photo(width: int, height: int, seed: int | Sequence[int]) -> bytes:
    """A JPEG of smooth shading, a few hard-edged objects and fine grain; equal seeds give equal bytes."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((height, width, 3), dtype=np.float32)
    octaves = max(1, math.ceil(math.log2(max(width, height))) - 1)
    for octave in range(octaves):  # amplitudes fall with frequency, as in photographs
        rows, columns = min(height, 2 << octave), min(width, 2 << octave)
        coarse = Image.fromarray(rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        layer = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
        canvas += (layer - 127.5) * 0.9 / 1.6**octave
    picture = Image.fromarray(np.clip(canvas + 127.5, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 9))):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        right, bottom = x + int(rng.integers(1, width // 3 + 2)), y + int(rng.integers(1, height // 3 + 2))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, right, bottom), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=88)
    return encoded.getvalue()
