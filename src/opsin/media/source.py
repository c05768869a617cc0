"""One picture in any form that a caller may give it: its size and digest now, its pixels when they are wanted.

A picture handed over as an object is not copied: it must not change until its request has ended.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestError
from opsin.media.decode import AlphaMode, background, check_size, decode_rgb, to_rgb
from opsin.media.sniff import ImageHeader, check_num_bytes, check_num_pixels, read_header

Noun = Literal["picture", "video"]

_URL = re.compile(r"(?:https?|data|file|s3|gs):", re.IGNORECASE)

_LOADING = threading.Lock()
"""Pillow reads a lazily opened file without a lock, and several requests may show one and the same ``Image``."""


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """A picture file's bytes. EXIF orientation is applied, to the size here and to the pixels.

    Attributes:
        digest: BLAKE2b-256 of the bytes; equal digests mean equal pictures, whatever form they came in.
    """

    noun: ClassVar[Noun] = "picture"

    data: bytes
    header: ImageHeader
    digest: bytes
    alpha: AlphaMode

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture."""
        return self.header.width, self.header.height

    @property
    def num_pixels(self) -> int:
        return self.header.width * self.header.height

    def decode(self) -> Image.Image:
        """RGB, upright.

        Raises:
            MediaError: ``image_parse_error``.
        """
        return decode_rgb(self.data, self.header, self.alpha)

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The picture as a video of one frame."""
        return (self.decode() for _ in indices)


@dataclass(frozen=True, slots=True)
class PixelPicture:
    """A Pillow picture or an array: already decoded, taken as it is.

    Attributes:
        digest: BLAKE2b-256 of everything that decides the pixels: mode, size, palette and transparency, or shape.
    """

    noun: ClassVar[Noun] = "picture"

    pixels: Image.Image | npt.NDArray[np.uint8]
    size: tuple[int, int]
    digest: bytes
    alpha: AlphaMode

    @property
    def num_pixels(self) -> int:
        return self.size[0] * self.size[1]

    def decode(self) -> Image.Image:
        """RGB.

        Raises:
            MediaError: Pillow cannot convert the mode, or the picture was resized in the meantime.
        """
        if isinstance(self.pixels, Image.Image):
            rgb = to_rgb(self.pixels, self.alpha)
        else:
            rgb = Image.fromarray(_array_to_rgb(self.pixels, self.alpha))
        check_size(rgb, *self.size)
        return rgb

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The picture as a video of one frame."""
        return (self.decode() for _ in indices)


PictureSource = EncodedPicture | PixelPicture


def open_picture(picture: object, config: MediaConfig) -> PictureSource:
    """Take a Pillow picture, an (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8 array, encoded bytes, or a path.

    Reads a path's file; decodes nothing, except that a Pillow picture not loaded yet is loaded.

    Raises:
        MediaError: with OpenAI's code for what is wrong.
    """
    if isinstance(picture, Image.Image):
        return _open_pillow(picture, config)
    if isinstance(picture, np.ndarray):
        return _open_array(cast(npt.NDArray[Any], picture), config)
    if isinstance(picture, bytes | bytearray):
        return open_encoded(bytes(picture), config)
    if isinstance(picture, str | os.PathLike):
        path = cast(str | os.PathLike[str], picture)
        with naming(path):
            return open_encoded(read_regular_file(path, config.max_media_bytes), config)
    raise MediaError(
        f"A picture may be a PIL.Image, a NumPy array, encoded bytes or a path; got {type(picture).__name__}.",
        code="invalid_image_format",
    )


def open_encoded(data: bytes, config: MediaConfig) -> EncodedPicture:
    """Take a picture file's bytes.

    Raises:
        MediaError: as ``sniff.read_header`` does.
    """
    header = read_header(data, max_pixels=config.max_image_pixels, max_bytes=config.max_media_bytes)
    digest = hashlib.blake2b(data, digest_size=32, person=b"encoded").digest()
    return EncodedPicture(data, header, digest, alpha_of(config))


def alpha_of(config: MediaConfig) -> AlphaMode:
    """What transparent parts of pictures show."""
    return background_of(config.media_io_kwargs) or config.image_alpha


def background_of(media_io_kwargs: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """vLLM's setting for transparent pictures, where it is given.

    Raises:
        RequestError: another setting of pictures, or no colour.
    """
    settings: Any = media_io_kwargs.get("image") or {}
    if not isinstance(settings, Mapping) or any(key != "rgba_background_color" for key in cast("Any", settings)):
        raise _wrong_setting(f"its image settings are {settings!r:.200}; there is 'rgba_background_color'")
    colour = cast("Mapping[str, Any]", settings).get("rgba_background_color")
    if colour is None:
        return None
    values = list(cast("Sequence[Any]", colour)) if isinstance(colour, list | tuple) else []
    if len(values) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in values):
        raise _wrong_setting(f"rgba_background_color is {colour!r:.200}; it must be [red, green, blue], each 0 to 255")
    red, green, blue = values
    return red, green, blue


def _wrong_setting(what: str) -> RequestError:
    return RequestError(f"media_io_kwargs: {what}.", param="media_io_kwargs")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Generator[None]:
    """The errors of a file that the caller named: they tell its name, and of a URL what takes those."""
    try:
        yield
    except MediaError as error:
        told = f"{error} The path was {os.fspath(path)!r:.200}"
        if _URL.match(str(path)):
            told += ", a URL: give those to chat, as image_url or video_url, or fetch them first"
        raise MediaError(f"{told}.", code=error.code, param=error.param) from None


def _open_pillow(image: Image.Image, config: MediaConfig) -> PixelPicture:
    check_num_pixels(*image.size, config.max_image_pixels)
    try:
        with _LOADING:
            image.load()
    except Exception:  # a lazily opened file: decoders raise anything at all, and their texts may hold addresses
        message = "The PIL.Image cannot be loaded: its file is corrupt or closed."
        raise MediaError(message, code="image_parse_error") from None
    digest = hashlib.blake2b(digest_size=32, person=b"pillow")
    palette = image.palette
    for part in (
        f"{image.mode} {image.width} {image.height}".encode(),
        b"" if palette is None else palette.mode.encode() + palette.tobytes(),
        repr(image.info.get("transparency")).encode(),
        image.tobytes(),
    ):
        _add_part(digest, part)
    return PixelPicture(image, image.size, digest.digest(), alpha_of(config))


def _open_array(array: npt.NDArray[Any], config: MediaConfig) -> PixelPicture:
    shape = array.shape
    if array.dtype != np.uint8:
        hint = "; multiply by 255 and convert" if array.dtype.kind == "f" else ""
        raise MediaError(
            f"A picture array must hold uint8 values 0 to 255; got {array.dtype}{hint}.", code="invalid_image_format"
        )
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))):
        hint = "; move the channels last" if len(shape) == 3 and shape[0] in (1, 3, 4) else ""
        raise MediaError(
            f"A picture array must be (height, width) or (height, width, 1, 3 or 4); got {shape}{hint}.",
            code="invalid_image_format",
        )
    height, width = shape[:2]
    check_num_pixels(width, height, config.max_image_pixels)
    digest = hashlib.blake2b(digest_size=32, person=b"array")
    _add_part(digest, repr(shape).encode())
    _add_part(digest, np.ascontiguousarray(array).data.cast("B"))
    return PixelPicture(array, (width, height), digest.digest(), alpha_of(config))


def _add_part(digest: hashlib.blake2b, part: bytes | memoryview) -> None:
    """Hash a part behind its length, so that no two sequences of parts read alike."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _array_to_rgb(array: npt.NDArray[np.uint8], alpha: AlphaMode) -> npt.NDArray[np.uint8]:
    if array.ndim == 2:
        array = array[:, :, None]
    channels = array.shape[2]
    if channels == 1:
        array = np.repeat(array, 3, axis=2)
    elif channels == 4 and alpha != "drop":
        opacity = array[:, :, 3:] / 255
        array = np.rint(opacity * array[:, :, :3] + (1 - opacity) * background(alpha)).astype(np.uint8)
    return np.ascontiguousarray(array[:, :, :3])


def read_regular_file(path: str | os.PathLike[str], max_bytes: int, *, beneath: Path | None = None) -> bytes:
    """Read a regular file whole, opened once and checked by its descriptor; never blocks on a pipe or a device.

    Args:
        beneath: the folder, without links, that the file must be in, whatever became of the path since it was checked.

    Raises:
        MediaError: ``invalid_image_url`` where it cannot be read, ``image_file_too_large``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise MediaError(f"Cannot open the picture's file: {reason}.", code="invalid_image_url") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError("The picture's path is not that of a regular file.", code="invalid_image_url")
        if beneath is not None and not Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(beneath):
            raise MediaError("The picture's path leads out of the allowed folder.", code="invalid_image_url")
        check_num_bytes(status.st_size, max_bytes)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise MediaError(f"Cannot read the picture's file: {error.strerror}.", code="invalid_image_url") from None
    finally:
        os.close(descriptor)
    check_num_bytes(len(data), max_bytes)  # it may have grown
    return data
