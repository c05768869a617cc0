"""JPEGs decoded on the device beside the engine's steps, where ``jpeg_decoder`` is 'gpu'.

Only plain, whole ones are (``media.jpeg``); all else goes to the media workers, and so does what the device's decoder
does not take or finds damaged. They have the last word, so errors are the same on either road.
"""

from __future__ import annotations

import ctypes
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image

from opsin.engine.beside import BesideThread
from opsin.errors import ConfigError
from opsin.kernels.nvjpeg import MAX_BATCH, MAX_BATCH_PIXELS, Jpeg, JpegDecoder, load_library
from opsin.media.jpeg import is_plain
from opsin.media.source import EncodedPicture

logger = logging.getLogger(__name__)

_MAX_MEAN_ERROR = 2.0  # of a soft picture's values, 0 to 255; wrong colours or rows are tens apart


class JpegThread(BesideThread[EncodedPicture, torch.Tensor | None]):
    """Decodes as many at once as wait, to uint8 (height, width, 3) on the device; None where workers are to do it.

    Args:
        decoder: used from this thread alone, and closed with it.
        on_finished: called on the thread after each batch; must be quick.
        deadline_s: for one batch.
    """

    def __init__(self, decoder: JpegDecoder, on_finished: Callable[[], None], deadline_s: float) -> None:
        super().__init__("JPEG decoder", self._decode, on_finished, max_items=MAX_BATCH, deadline_s=deadline_s)
        self._decoder = decoder

    def close(self) -> bool:
        has_ended = super().close()
        if has_ended:  # else the decoder is still at work, and keeps what it holds
            self._decoder.close()
        return has_ended

    def _decode(self, pictures: Sequence[EncodedPicture]) -> list[torch.Tensor | None]:
        jpegs = {i: Jpeg(picture.data, *picture.size) for i, picture in enumerate(pictures)}
        made: list[torch.Tensor | None] = [None] * len(pictures)
        for batch in _batches([i for i, jpeg in jpegs.items() if is_plain(*jpeg)], jpegs):
            try:
                decoded = self._decoder.decode([jpegs[i] for i in batch])
            except torch.OutOfMemoryError:  # of the device, which the workers do not need
                continue
            for i, picture in zip(batch, decoded, strict=True):
                made[i] = picture
        return made


def find_nvjpeg(wanted: Literal["cpu", "gpu"], device: torch.device) -> ctypes.CDLL | None:
    """The library, where it is asked for.

    Raises:
        ConfigError: it cannot be had.
    """
    if wanted == "cpu":
        return None
    if device.type != "cuda":
        raise ConfigError(f"jpeg_decoder is 'gpu' and the device {str(device)!r}, which has no nvJPEG; write 'cpu'.")
    return load_library()


def open_decoder(library: ctypes.CDLL, device: torch.device, max_raw_pixels: int) -> JpegDecoder | None:
    """The device's decoder, tried on one picture; None where the workers are to decode all the same.

    Args:
        max_raw_pixels: of pictures that the device resizes. Where it does not, decoding there saves nothing.

    Raises:
        ConfigError: it does not work.
    """
    if not max_raw_pixels:
        logger.warning("JPEGs are decoded on the CPU, where pictures are resized here, whatever jpeg_decoder says.")
        return None
    decoder = JpegDecoder(library, device, torch.cuda.Stream(device))
    check_decoder(decoder)
    logger.info("JPEGs are decoded on the GPU, by nvJPEG's %s backend.", decoder.backend)
    return decoder


def check_decoder(decoder: JpegDecoder) -> None:
    """Have a picture decoded that says what is wrong with colours, rows or chroma.

    Raises:
        ConfigError: it is not the picture that Pillow sees.
    """
    y, x = np.mgrid[:96, :128].astype(np.float32)
    soft = np.stack([x * 2, y * 2.5, 128 + 90 * np.sin(x / 19) * np.cos(y / 13)], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(soft).save(file, "JPEG", quality=95)
    (made,) = decoder.decode([Jpeg(file.getvalue(), 128, 96)])
    if made is None:
        raise ConfigError("nvJPEG does not decode a plain JPEG here; write jpeg_decoder='cpu'.")
    with Image.open(file) as image:
        error = np.abs(made.cpu().numpy().astype(np.int16) - np.asarray(image.convert("RGB"))).mean()
    if error > _MAX_MEAN_ERROR:
        raise ConfigError(
            f"nvJPEG's values are off Pillow's by {error:.1f} on average, of a picture on which {_MAX_MEAN_ERROR:g} "
            "would be much; write jpeg_decoder='cpu'."
        )


def _batches(indices: Sequence[int], jpegs: dict[int, Jpeg]) -> Iterator[list[int]]:
    """In order, each of at most ``MAX_BATCH_PIXELS``; a larger picture comes alone."""
    batch: list[int] = []
    num_pixels = 0
    for i in indices:
        size = jpegs[i].width * jpegs[i].height
        if batch and num_pixels + size > MAX_BATCH_PIXELS:
            yield batch
            batch, num_pixels = [], 0
        batch.append(i)
        num_pixels += size
    if batch:
        yield batch
