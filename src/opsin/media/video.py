"""Videos from encoded bytes: what the container says, and the frames that are wanted of it.

Parsing a container is work for C libraries on hostile bytes, so ``read_video_header`` and ``decode_frames`` belong in
a worker process that may be killed; only ``detect_video_format`` runs anywhere. The demuxer is chosen by magic numbers
and named to FFmpeg, which would otherwise also try playlists and other formats that open further files.
"""

# PyAV's stubs know little.
# pyright: standard

from __future__ import annotations

import importlib.util
import io
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, Literal

import msgspec
from PIL import Image

from opsin.errors import MediaError
from opsin.media.decode import check_size
from opsin.media.sniff import check_num_pixels, detect_format, open_lazily

VideoFormat = Literal["mov", "matroska", "avi", "mpegts", "mpeg", "flv", "GIF", "WebP"]

_MAX_PACKETS = 1_000_000
_MAX_BOXES = 10_000
_INDEXED = ("mov", "matroska")  # where a leap to a keyframe arrives there
_TS_PACKET = 188
_TURNS = {  # counter-clockwise degrees, as display matrices have them
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


class VideoHeader(msgspec.Struct, frozen=True):
    """What is known of a video before its frames are wanted.

    Attributes:
        width: of the upright frames; likewise ``height``.
        num_frames: counted, not believed.
        fps: frames per second on average; None where the container has no clock.
    """

    format: VideoFormat
    width: int
    height: int
    num_frames: int
    fps: float | None


def detect_video_format(data: bytes) -> VideoFormat:
    """Name the container by magic number.

    Raises:
        MediaError: ``empty_video_file``, or ``invalid_video_format``: a picture, or no container that is read.
    """
    if not data:
        raise MediaError("The video is empty: 0 bytes.", code="empty_video_file")
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    if data.startswith(b"FLV\x01"):
        return "flv"
    if data.startswith(b"\0\0\x01\xba"):
        return "mpeg"
    if len(data) > _TS_PACKET and data[0] == data[_TS_PACKET] == 0x47:
        return "mpegts"
    try:
        picture = detect_format(data)
    except MediaError:
        message = (
            "The data is not a video in a format that opsin reads (MP4, MOV, WebM, Matroska, AVI, MPEG, FLV, GIF)."
        )
    else:
        if picture in ("GIF", "WebP"):
            return picture
        message = f"The data is a {picture} picture, not a video; send it as an image."
    raise MediaError(message, code="invalid_video_format")


def check_decoder(format: VideoFormat) -> None:
    """See that there is a decoder for the format.

    Raises:
        MediaError: ``invalid_video_format``: PyAV is not installed.
    """
    if format not in ("GIF", "WebP") and importlib.util.find_spec("av") is None:
        raise MediaError(
            "Videos cannot be decoded here: PyAV is not installed. Install it with pip install 'opsin[video]', or give "
            "the video as a list of frames.",
            code="invalid_video_format",
        )


def read_video_header(data: bytes | IO[bytes], format: VideoFormat, *, max_pixels: int) -> VideoHeader:
    """Count the frames of a video and decode its first, for the upright size.

    Raises:
        MediaError: ``video_parse_error``: corrupt, cut short, or without a frame; ``video_too_large``: a frame of more
            than ``max_pixels``.
    """
    with _reporting(format):
        if format == "GIF" or format == "WebP":
            return _read_animation(data, format, max_pixels)
        if format == "mov":
            _check_boxes(data)
        with _open(data, format) as container:
            stream = container.streams.video[0]
            if stream.codec_context.width:  # before a decoder allocates for it; what is decoded is looked at again
                check_num_pixels(stream.codec_context.width, stream.codec_context.height, max_pixels)
            num_frames = len(_packets(container, stream))
            fps = stream.average_rate or stream.guessed_rate
        if num_frames == 0:
            raise _broken("The video has not one frame.")
        with _open(data, format) as container:
            frame = next(container.decode(container.streams.video[0]), None)
            if frame is None:
                raise _broken("The video's first frame cannot be decoded.")
            width, height = (frame.width, frame.height)[:: -1 if frame.rotation % 180 else 1]
            check_num_pixels(width, height, max_pixels)
    return VideoHeader(format, width, height, num_frames, float(fps) if fps else None)


def decode_frames(data: bytes | IO[bytes], header: VideoHeader, wanted: Sequence[int]) -> Iterator[Image.Image]:
    """Upright RGB of the frames with these ascending indices, counted in the order in which they are shown.

    Raises:
        MediaError: ``video_parse_error``: corrupt or cut short, or not the size that the header announced.
    """
    with _reporting(header.format):
        if header.format == "GIF" or header.format == "WebP":
            frames = _decode_animation(data, header.format, wanted)
        else:
            frames = _decode_stream(data, header.format, wanted)
        for frame in frames:
            check_size(frame, header.width, header.height)
            yield frame


# ------------------------------------------------------------------------------------------ containers, by PyAV


def _open(data: bytes | IO[bytes], format: VideoFormat) -> Any:
    import av  # large, and an extra

    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    stream.seek(0)
    # No protocol is allowed, so a file that names other files opens none.
    container = av.open(
        stream, format=format, container_options={"protocol_whitelist": "none"}, metadata_errors="ignore"
    )
    if not container.streams.video:
        container.close()
        raise _broken("The file has no video stream.")
    container.streams.video[0].thread_type = "NONE"  # there is one worker a core already
    return container


def _check_boxes(data: bytes | IO[bytes]) -> None:
    """Refuse an MP4 file that ends before its outermost boxes do, and so was cut short."""
    view: Any = data  # bytes, or a mapping of them
    end, at = len(view), 0
    for _ in range(_MAX_BOXES):
        if at + 8 > end:
            break
        size = int.from_bytes(view[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(view[at + 8 : at + 16], "big")
        if size < 8:  # 0: to the end; anything else is for the parser to judge
            return
        at += size
    if at > end:
        raise _broken("The video is cut short: its file ends before its contents do.")


def _packets(container: Any, stream: Any) -> list[tuple[int | None, bool]]:
    """(time, is a keyframe) of every frame that the file holds, in the order of the file."""
    found: list[tuple[int | None, bool]] = []
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        if packet.is_corrupt:
            raise _broken("The video is corrupt or cut short.")
        found.append((packet.pts, packet.is_keyframe))
        if len(found) > _MAX_PACKETS:
            raise MediaError(f"The video has more than {_MAX_PACKETS} frames. Cut it first.", code="video_too_large")
    return found


def _decode_stream(data: bytes | IO[bytes], format: VideoFormat, wanted: Sequence[int]) -> Iterator[Image.Image]:
    with _open(data, format) as container:
        packets = _packets(container, container.streams.video[0])
    with _open(data, format) as container:
        stream = container.streams.video[0]
        times = [time for time, _ in packets if time is not None]
        if len(set(times)) == len(packets):
            keys = sorted(time for time, is_key in packets if is_key and time is not None) if format in _INDEXED else []
            frames = _at_times(container, stream, sorted(times), keys, wanted)
        else:
            frames = _by_count(container.decode(stream), wanted)
        for frame in frames:
            picture = frame.to_image()
            turn = _TURNS.get(frame.rotation % 360)
            yield picture if turn is None else picture.transpose(turn)


def _at_times(container: Any, stream: Any, times: list[int], keys: list[int], wanted: Sequence[int]) -> Iterator[Any]:
    """Decoded frames by their times, leaping to the last keyframe before one where that saves decoding."""
    frames = container.decode(stream)
    reached = times[0]
    for index in wanted:
        time = _item(times, index)
        before = bisect_right(keys, time) - 1
        if before >= 0 and keys[before] > reached:
            container.seek(keys[before], stream=stream)
            frames = container.decode(stream)
        # Some codecs have packets that show nothing; the frame after them is as near as can be.
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)
        if frame is None:
            raise _broken("The video is corrupt or cut short: its frames cannot be decoded to the end.")
        reached = frame.pts
        yield frame


def _by_count(frames: Iterable[Any], wanted: Sequence[int]) -> Iterator[Any]:
    at = iter(enumerate(frames))
    for index in wanted:
        frame = next((frame for i, frame in at if i == index), None)
        if frame is None:
            raise _broken("The video is corrupt or cut short: its frames cannot be decoded to the end.")
        yield frame


def _item(times: Sequence[int], index: int) -> int:
    if index >= len(times):
        raise _broken("The video has fewer frames than its header said.")
    return times[index]


# ------------------------------------------------------------------------------------------ animations, by Pillow


def _read_animation(data: bytes | IO[bytes], format: Literal["GIF", "WebP"], max_pixels: int) -> VideoHeader:
    with open_lazily(data, format) as image:
        check_num_pixels(*image.size, max_pixels)
        num_frames = getattr(image, "n_frames", 1)
        milliseconds = 0
        for i in range(num_frames):
            image.seek(i)
            image.load()
            milliseconds += image.info.get("duration", 0)
        return VideoHeader(format, *image.size, num_frames, 1000 * num_frames / milliseconds if milliseconds else None)


def _decode_animation(
    data: bytes | IO[bytes], format: Literal["GIF", "WebP"], wanted: Sequence[int]
) -> Iterator[Image.Image]:
    with open_lazily(data, format) as image:
        for index in wanted:
            image.seek(index)
            yield image.convert("RGBA").convert("RGB")


# --------------------------------------------------------------------------------------------------------- errors


@contextmanager
def said_of_videos() -> Generator[None]:
    """The errors of what pictures and videos share, which speaks of pictures: their codes have twins for videos."""
    try:
        yield
    except MediaError as error:
        message = str(error).replace("picture", "video").replace("Picture", "Video")
        raise MediaError(message, code=error.code and error.code.replace("image", "video"), param=error.param) from None


@contextmanager
def _reporting(format: VideoFormat) -> Generator[None]:
    """Decoders meet hostile bytes, and raise anything at all; no text of theirs is kept."""
    try:
        with said_of_videos():
            yield
    except (MediaError, MemoryError):
        raise
    except Exception:
        raise _broken(f"The video ({format}) is corrupt or cut short: it cannot be decoded.") from None


def _broken(message: str) -> MediaError:
    return MediaError(message, code="video_parse_error")
