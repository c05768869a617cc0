"""What an encoded picture is, and how large: from its first bytes and its header alone, nothing decoded.

The format is told by magic numbers and only then is that one parser run; a file's name or MIME type is never
believed. Formats outside ``FORMATS`` are refused unparsed.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import IO, Literal, get_args

import msgspec
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from opsin.errors import MediaError

ImageFormat = Literal["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"]
FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)

_ORIENTATION_TAG = 0x0112
_MAX_HEADER_READS = 20_000  # a few hundred are usual; Pillow reads fillers byte by byte
_MAX_HEADER_BYTES = 2**23  # phones put depth maps of some megabytes before the pixels
_MAX_PNG_CHUNKS = 2**16
_MAX_PLAIN_SEGMENTS = 32
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHERS = {  # what people take for pictures, to be told of and never parsed
    "AVIF": re.compile(rb"....ftypavi[fs]", re.DOTALL),
    "HEIC, as phones make it": re.compile(rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL),
    "a video": re.compile(rb"....ftyp|\x1aE\xdf\xa3", re.DOTALL),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    "JPEG XL": re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"),
    "a PDF": re.compile(rb"%PDF-"),
    "SVG": re.compile(rb"\s*(?:<\?xml[^>]{,200}>\s*)?<svg", re.IGNORECASE),
    "a web page": re.compile(rb"\s*<(?:!doctype )?html", re.IGNORECASE),
    "base64 text that was not decoded": re.compile(rb"(?:data:image/[^,]{,100},)?(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)"),
}

# The plugin classes rather than Image.open(): no other parser can run, and the limits are ours, not those of a
# module-level variable that any library in the process may change.
_PLUGINS: dict[ImageFormat, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}


class ImageHeader(msgspec.Struct, frozen=True):
    """What a picture's header says.

    Attributes:
        width: of the upright picture, after its EXIF orientation.
        height: likewise.
        orientation: EXIF's, 1 to 8, that decoding has still to apply; 1 is upright.
    """

    format: ImageFormat
    width: int
    height: int
    orientation: int = 1


def detect_format(data: bytes) -> ImageFormat:
    """Name the format by magic number.

    Raises:
        MediaError: ``empty_image_file``, or ``invalid_image_format`` for anything but the formats taken.
    """
    if not data:
        raise MediaError("The picture is empty: 0 bytes.", code="empty_image_file")
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    if data.startswith(_TIFF_MAGICS):
        return "TIFF"
    likely = next((name for name, pattern in _OTHERS.items() if pattern.match(data)), None)
    raise MediaError(
        f"The data is not a picture in a format that opsin reads ({', '.join(FORMATS)})"
        + (f"; it looks like {likely}." if likely else "."),
        code="invalid_image_format",
    )


def open_lazily(data: bytes | IO[bytes], format: ImageFormat) -> ImageFile.ImageFile:
    """Parse the header with this format's parser alone; pixels are decoded by ``load()``.

    Raises:
        MediaError: ``image_parse_error``.
    """
    stream = _HeaderFile(data, format) if isinstance(data, bytes) else data
    try:
        image = _PLUGINS[format](stream)
    except Image.DecompressionBombError:
        raise MediaError("The picture has too many pixels.", code="image_too_large") from None
    except Exception:  # parsers meet hostile bytes here, and raise anything at all; their texts may hold addresses
        raise MediaError(f"The {format} picture's header cannot be read.", code="image_parse_error") from None
    if isinstance(stream, _HeaderFile):
        stream.end_header()
    return image


def hush_pillow() -> None:
    """Let this process not warn of what Pillow finds odd in pictures: strangers' would fill a server's log, and
    Python's record of the warnings that it has given, of which it forgets none.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


class _HeaderFile(io.BytesIO):
    """A file whose header may be so long, in so many pieces: a hostile one would keep the parser busy for a minute."""

    def __init__(self, data: bytes, format: ImageFormat) -> None:
        super().__init__(data)
        self._num_reads_left: float = _MAX_HEADER_READS
        self._num_bytes_left: float = math.inf if format == "WebP" else _MAX_HEADER_BYTES  # libwebp wants it whole

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._num_reads_left -= 1
        self._num_bytes_left -= len(data)
        if min(self._num_reads_left, self._num_bytes_left) < 0:
            raise ValueError("the header is too long")
        return data

    def end_header(self) -> None:
        """From here on it is pixels."""
        self._num_reads_left = self._num_bytes_left = math.inf


def read_header(data: bytes, *, max_pixels: int, max_bytes: int) -> ImageHeader:
    """Read the upright size of an encoded picture.

    Raises:
        MediaError: ``empty_image_file``, ``image_file_too_large``, ``invalid_image_format``, ``image_parse_error``
            or ``image_too_large``.
    """
    check_num_bytes(len(data), max_bytes)
    format = detect_format(data)
    if format == "JPEG" and (size := plain_jpeg_size(data)) is not None:
        check_num_pixels(*size, max_pixels)
        return ImageHeader(format, *size)
    with open_lazily(data, format) as image:
        width, height = image.size
        check_num_pixels(width, height, max_pixels)
        orientation = _orientation(image, data, format)
    if orientation >= 5:  # these four swap the axes
        width, height = height, width
    return ImageHeader(format, width, height, orientation)


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of an upright JPEG whose header needs no Pillow, as most libraries write it; None of all others.

    Pillow would say the same, but takes as long as the digest of the picture.

    Args:
        data: the picture, or the beginning that holds its header.
    """
    size, at = None, 2
    for _ in range(_MAX_PLAIN_SEGMENTS):
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        begin, at = at + 4, at + 2 + length
        if length < 2 or at > len(data):
            return None
        match marker:
            case b"\xff\xda":  # the scan
                return size
            case b"\xff\xc0" | b"\xff\xc2" if size is None and length in (11, 17):  # the frame, of one or three colours
                precision, num_colours = data[begin], data[begin + 5]
                size = (
                    int.from_bytes(data[begin + 3 : begin + 5], "big"),
                    int.from_bytes(data[begin + 1 : begin + 3], "big"),
                )
                if precision != 8 or length != 8 + 3 * num_colours or 0 in size:
                    return None
            case b"\xff\xdb" if (length - 2) % 65 == 0:  # quantization
                if any(name > 15 for name in data[begin:at:65]):
                    return None
            case b"\xff\xe0" if length >= 16 and data.startswith(b"JFIF\0", begin):
                pass
            case b"\xff\xc4" | b"\xff\xdd":  # codes, restart intervals
                pass
            case _:
                return None
    return None


def check_num_bytes(num_bytes: int, max_bytes: int) -> None:
    """Refuse files above the limit: ``image_file_too_large``."""
    if num_bytes > max_bytes:
        raise MediaError(
            f"The picture's file has {num_bytes} bytes; at most {max_bytes} are taken (max_media_bytes).",
            code="image_file_too_large",
        )


def check_num_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse sizes above the limit (``image_too_large``) and empty ones (``image_parse_error``)."""
    if width < 1 or height < 1:
        raise MediaError(f"The picture is {width} x {height} pixels: it has none.", code="image_parse_error")
    if width * height > max_pixels:
        raise MediaError(
            f"The picture is {width} x {height} = {width * height} pixels; at most {max_pixels} are taken "
            "(max_image_pixels). Scale it down first.",
            code="image_too_large",
        )


def _orientation(image: ImageFile.ImageFile, data: bytes, format: ImageFormat) -> int:
    """EXIF orientation, else XMP's, else 1; nonsense counts as upright."""
    if format == "TIFF":  # Pillow turns these while decoding, and reports the upright size
        return 1
    exif_bytes = image.info.get("exif")
    if exif_bytes is None and format == "PNG":
        exif_bytes = _png_exif(data)
    value: object = None
    if isinstance(exif_bytes, bytes):
        exif = Image.Exif()
        try:
            exif.load(exif_bytes)
            value = exif.get(_ORIENTATION_TAG)
        except Exception:  # as above; a broken camera tag is no reason to refuse the picture
            value = None
    if value is None:
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        match = _XMP_ORIENTATION.search(xmp.encode(errors="ignore") if isinstance(xmp, str) else xmp) if xmp else None
        value = int(match[1]) if match else 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_exif(data: bytes) -> bytes | None:
    """The eXIf chunk, which may come after the pixels, where Pillow would only find it by decoding them."""
    position = 8
    for _ in range(_MAX_PNG_CHUNKS):
        if position + 8 > len(data):
            break
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"eXIf":
            return b"Exif\0\0" + data[position + 8 : position + 8 + length]
        position += length + 12
    return None
