"""JPEGs by simplejpeg, where it is installed: straight to where their pixels are wanted.

Pillow has libjpeg-turbo, too, but decodes to four bytes a pixel, of which three have then to be copied out, twice: 2.4
ms for a 1024x768 JPEG where this takes 1.6 (one Zen 5 core, caches cold). The bytes are the same; every start looks.
"""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from opsin.media.decode import decode_rgb
from opsin.media.ops import PixelArray
from opsin.media.sniff import ImageHeader

logger = logging.getLogger(__name__)

_SPACES = frozenset(["YCbCr", "RGB", "Gray"])  # four colours are turned into three as one likes
_SEEN = (("RGB", "4:2:0", False), ("RGB", "4:4:4", True), ("L", "4:2:0", False))
_SIDES = 51, 37  # no multiple of a block's, so that chroma is made up at the edges


class Turbo:
    """Fills memory with the pixels of whole, upright JPEGs.

    Args:
        read_header: ``simplejpeg.decode_jpeg_header``.
        decode: ``simplejpeg.decode_jpeg``.
    """

    def __init__(self, read_header: Callable[..., Any], decode: Callable[..., Any]) -> None:
        self._read_header = read_header
        self._decode = decode

    def fill(self, data: bytes | bytearray | memoryview, header: ImageHeader, out: PixelArray) -> bool:
        """Fill ``out``, flat uint8, with RGB rows; False where Pillow has to see the picture, or to say what is wrong.

        ``out`` may then hold anything.
        """
        if header.format != "JPEG" or header.orientation != 1:
            return False
        try:
            height, width, space, _ = self._read_header(data)
            if (width, height) != (header.width, header.height) or space not in _SPACES:
                return False
            self._decode(data, "RGB", buffer=out.reshape(height, width, 3))
        except Exception:  # it is cut short, say; Pillow has the last word
            return False
        return True

    def makes_pillows_bytes(self) -> bool:
        """Some pictures come out as the installed Pillow decodes them, whose libjpeg may be another."""
        y, x = np.mgrid[: _SIDES[1], : _SIDES[0]]
        pixels = np.stack([5 * x, 6 * y, 90 + 3 * x - 2 * y], axis=-1).astype(np.uint8)
        for mode, subsampling, progressive in _SEEN:
            file = io.BytesIO()
            picture = Image.fromarray(pixels).convert(mode)
            picture.save(file, "JPEG", quality=80, subsampling=subsampling, progressive=progressive)
            header = ImageHeader("JPEG", *_SIDES)
            out = np.empty(pixels.size, np.uint8)
            expected = np.asarray(decode_rgb(file.getvalue(), header, "white")).reshape(-1)
            if not (self.fill(file.getvalue(), header, out) and np.array_equal(out, expected)):
                return False
        return True


def open_turbo() -> Turbo | None:
    """The decoder, if it is installed and does what Pillow does."""
    try:
        simplejpeg = importlib.import_module("simplejpeg")
        turbo = Turbo(simplejpeg.decode_jpeg_header, simplejpeg.decode_jpeg)
        if turbo.makes_pillows_bytes():
            return turbo
        logger.warning("JPEGs are decoded by Pillow, since simplejpeg decodes them otherwise than this one does.")
    except ModuleNotFoundError:
        pass
    except Exception as error:  # it was built for another numpy, say; no picture depends on it
        logger.warning("JPEGs are decoded by Pillow, since simplejpeg does not work here: %s", error)
    return None
