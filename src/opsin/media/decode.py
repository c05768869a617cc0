"""Encoded bytes or any Pillow picture to upright RGB."""

from __future__ import annotations

from typing import IO, Literal

from PIL import Image

from opsin.errors import MediaError
from opsin.media.sniff import ImageHeader, open_lazily

AlphaMode = Literal["white", "drop"] | tuple[int, int, int]
"""What shows where a picture is transparent: white, whatever colour hides there, or this one (red, green, blue)."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_rgb(data: bytes | IO[bytes], header: ImageHeader, alpha: AlphaMode) -> Image.Image:
    """Decode the first frame, make it RGB and turn it upright.

    Raises:
        MediaError: ``image_parse_error``: corrupt or truncated, or not the size that the header announced.
    """
    with open_lazily(data, header.format) as image:
        try:
            image.load()
        except MemoryError:  # says nothing of the picture
            raise
        except Exception:  # decoders meet hostile bytes here, and raise anything at all; no text of theirs is kept
            raise MediaError(
                f"The {header.format} picture is corrupt or cut short: its pixels cannot be decoded.",
                code="image_parse_error",
            ) from None
        rgb = to_rgb(image, alpha)
    turn = _TURNS.get(header.orientation)
    if turn is not None:
        rgb = rgb.transpose(turn)
    check_size(rgb, header.width, header.height)
    return rgb


def to_rgb(image: Image.Image, alpha: AlphaMode) -> Image.Image:
    """Convert any Pillow mode to RGB; transparent parts show what ``alpha`` says.

    16-bit and float modes are clipped to 8 bits, not scaled, as Pillow (and so every Hugging Face processor) does.

    Raises:
        MediaError: ``invalid_image_format``: Pillow cannot convert the mode, or the picture was closed.
    """
    has_key = image.info.get("transparency") is not None  # PNG's tRNS, GIF's transparent index
    try:
        if alpha != "drop" and (has_key or image.mode in ("RGBA", "LA", "PA")):
            canvas = Image.new("RGBA", image.size, (*background(alpha), 255))
            canvas.alpha_composite(image.convert("RGBA"))
            return canvas.convert("RGB")
        if has_key:  # Pillow warns of palettes whose transparency it drops, which is what is asked for here
            image = image.copy()
            del image.info["transparency"]
        if image.mode == "RGB":  # converting would be a copy
            image.load()
            return image
        return image.convert("RGB")
    except (ValueError, OSError):
        raise MediaError(
            f"A picture of Pillow's mode {image.mode!r} cannot be converted to RGB, or was closed before it was.",
            code="invalid_image_format",
        ) from None


def background(alpha: Literal["white"] | tuple[int, int, int]) -> tuple[int, int, int]:
    """The colour behind transparent parts."""
    return (255, 255, 255) if alpha == "white" else alpha


def check_size(picture: Image.Image, width: int, height: int) -> None:
    """Refuse a picture that is not what its header, by which its request was admitted, said: ``image_parse_error``."""
    if picture.size != (width, height):
        raise MediaError(
            f"The picture's header says {width} x {height} pixels; it decodes to {picture.width} x {picture.height}.",
            code="image_parse_error",
        )
