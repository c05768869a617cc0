"""One video in any form that a caller may give it: its clip and digest now, the frames that are wanted later.

Frames handed over as objects are not copied: they must not change until their request has ended.
"""

# What is read here comes from callers, so it is Any until it was looked at.
# pyright: standard

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestError
from opsin.media.sniff import check_num_bytes
from opsin.media.source import Noun, PictureSource, background_of, naming, open_picture, read_regular_file
from opsin.media.video import (
    VideoFormat,
    VideoHeader,
    check_decoder,
    decode_frames,
    detect_video_format,
    said_of_videos,
)
from opsin.types import Clip

Probe = Callable[[bytes, VideoFormat], VideoHeader]
"""What reads a video's header; ``opsin.media.prober`` does it in a process that may die of it."""

_METADATA = ("total_num_frames", "fps", "duration", "frames_indices", "width", "height", "video_backend")
_IGNORED_METADATA = ("do_sample_frames",)


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """A video file's bytes. A rotation that it asks for is applied, to the size here and to the frames.

    Attributes:
        digest: BLAKE2b-256 of the bytes.
    """

    noun: ClassVar[Noun] = "video"

    data: bytes
    header: VideoHeader
    clip: Clip
    digest: bytes

    @property
    def num_pixels(self) -> int:
        """Of all frames that were chosen."""
        return self.clip.width * self.clip.height * len(self.clip.frames)

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """RGB of the frames with these ascending indices.

        Raises:
            MediaError: ``video_parse_error``.
        """
        return decode_frames(self.data, self.header, indices)


@dataclass(frozen=True, slots=True)
class FrameSequence:
    """A video that is pictures already, all of one size.

    Attributes:
        digest: BLAKE2b-256 over the pictures' own.
    """

    noun: ClassVar[Noun] = "video"

    pictures: Sequence[PictureSource]
    clip: Clip
    digest: bytes

    @property
    def num_pixels(self) -> int:
        """Of all frames that were chosen."""
        return self.clip.width * self.clip.height * len(self.clip.frames)

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """RGB of the frames with these indices.

        Raises:
            MediaError: one of them cannot be decoded.
        """
        return (self.pictures[i].decode() for i in indices)


VideoSource = EncodedVideo | FrameSequence


class FrameChoice(NamedTuple):
    """Which frames of an encoded video to take: evenly, so many at most (vLLM's 32 by default), or so many a second."""

    num_frames: int | None = 32
    fps: float | None = None

    @classmethod
    def of(cls, *layers: Mapping[str, Any] | None) -> FrameChoice:
        """Read ``media_io_kwargs``, the engine's and a request's over it. Those of pictures are checked.

        Raises:
            RequestError: an unknown key or a value that is no number.
        """
        merged: dict[str, Any] = {}
        for i, layer in enumerate(layers):
            if layer is None:
                continue
            if not isinstance(layer, Mapping) or not set(layer) <= {"image", "video"}:
                raise _wrong(f"it is {layer!r}; it must be {{'video': {{'num_frames': n, 'fps': f}}}}.")
            if background_of(layer) and i > 0:
                raise _wrong("a request has no settings for pictures; those of the engine hold.")
            video = layer.get("video") or {}
            if not isinstance(video, Mapping) or not set(video) <= {"num_frames", "fps"}:
                raise _wrong(f"its video settings are {video!r}; there are 'num_frames' and 'fps'.")
            merged |= video
        num_frames, fps = merged.get("num_frames", cls().num_frames), merged.get("fps")
        if num_frames is not None and type(num_frames) is not int:
            raise _wrong(f"num_frames is {num_frames!r}; it must be a whole number, or -1 for all.")
        if fps is not None and (not isinstance(fps, int | float) or isinstance(fps, bool) or not math.isfinite(fps)):
            raise _wrong(f"fps is {fps!r}; it must be a number, or -1 for any.")
        return cls(num_frames if num_frames and num_frames > 0 else None, fps if fps and fps > 0 else None)

    def frames(self, total: int, fps: float | None) -> tuple[int, ...]:
        """Indices out of ``total`` frames: the first, the last, and evenly between them."""
        count = min(total, self.num_frames or total)
        if self.fps is not None and fps is not None:
            count = min(count, max(1, math.floor(total / fps * self.fps)))
        return tuple(range(total)) if count == total else tuple(np.linspace(0, total - 1, count, dtype=int).tolist())


def open_video(video: Any, config: MediaConfig, choice: FrameChoice, probe: Probe) -> VideoSource:
    """Take a list of pictures, a (frames, height, width, 3) uint8 array, ``(either, metadata)``, bytes or a path.

    Arrays and torch tensors may also be as transformers' processors have them: (frames, 3, height, width), and floats
    of 0 to 255, which are rounded.

    Reads a path's file; decodes nothing of it.

    Raises:
        MediaError: with a code for what is wrong.
    """
    metadata: Any = None
    if is_described(video):
        video, metadata = video
    if isinstance(video, str | os.PathLike):
        with naming(video), said_of_videos():
            video = read_regular_file(video, config.max_media_bytes)
    if isinstance(video, bytes | bytearray):
        return _open_encoded(bytes(video), config, choice, probe)
    if hasattr(video, "numpy") and getattr(video, "ndim", None) == 4:
        video = video.numpy(force=True)  # a torch tensor, wherever it is
    if isinstance(video, np.ndarray) and video.ndim == 4:
        video = list(_as_pictures(video))
    if isinstance(video, list | tuple):
        return _open_frames(video, metadata, config)
    shape = f" of shape {video.shape}" if isinstance(video, np.ndarray) else ""
    raise MediaError(
        "A video may be a list of PIL.Image or arrays, a (frames, height, width, 3) array, (frames, metadata), encoded "
        f"bytes or a path; got {type(video).__name__}{shape}.",
        code="invalid_video_format",
    )


def is_described(video: object) -> bool:
    """Whether it is a pair of frames and metadata."""
    return isinstance(video, tuple) and len(video) == 2 and (video[1] is None or isinstance(video[1], Mapping))


def _open_encoded(data: bytes, config: MediaConfig, choice: FrameChoice, probe: Probe) -> EncodedVideo:
    with said_of_videos():
        check_num_bytes(len(data), config.max_media_bytes)
    format = detect_video_format(data)
    check_decoder(format)
    header = probe(data, format)
    frames = choice.frames(header.num_frames, header.fps)
    _check_count(len(frames), config)
    clip = Clip(header.width, header.height, header.num_frames, frames, header.fps)
    digest = hashlib.blake2b(data, digest_size=32, person=b"video").digest()
    return EncodedVideo(data, header, clip, digest)


def _as_pictures(frames: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(frames, height, width, channels) of uint8; what cannot be made that is left for ``open_picture`` to refuse."""
    if frames.shape[1] == 3 and frames.shape[3] not in (1, 3, 4):
        frames = np.moveaxis(frames, 1, 3)
    if frames.dtype.kind == "f" and frames.size:
        if frames.min() >= 0 and 1 < frames.max() <= 255:  # up to 1, they are fractions
            frames = np.rint(frames).astype(np.uint8)
    return frames


def _open_frames(frames: Sequence[Any], metadata: Mapping[str, Any] | None, config: MediaConfig) -> FrameSequence:
    if not frames:
        raise MediaError("The video has not one frame.", code="invalid_video_format")
    _check_count(len(frames), config)
    if any(isinstance(frame, str | os.PathLike) for frame in frames):  # a list may come from the network, as JSON
        raise MediaError(
            "The frames of a video must be pictures themselves, not paths; to give several videos by their paths, put "
            "them in a list under multi_modal_data.",
            code="invalid_video_format",
        )
    pictures = [open_picture(frame, config) for frame in frames]
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise MediaError(
            f"The frames of a video must have one size; got {', '.join(f'{w} x {h}' for w, h in sorted(sizes)[:4])}.",
            code="invalid_video_format",
        )
    digest = hashlib.blake2b(b"".join(picture.digest for picture in pictures), digest_size=32, person=b"frames")
    count = len(pictures)
    fps, recorded, num_recorded = _read_metadata(metadata or {}, count)
    clip = Clip(*sizes.pop(), count, tuple(range(count)), fps, recorded, num_recorded)
    return FrameSequence(pictures, clip, digest.digest())


def _read_metadata(metadata: Mapping[str, Any], count: int) -> tuple[float | None, tuple[int, ...], int]:
    """(fps, recorded, num_recorded) of ``Clip``."""
    unknown = sorted(str(key) for key in metadata if key not in _METADATA + _IGNORED_METADATA)
    if unknown:
        raise _bad_metadata(f"has unknown keys: {', '.join(unknown)}; known are {', '.join(_METADATA)}.")
    fps, total, indices = (metadata.get(key) for key in ("fps", "total_num_frames", "frames_indices"))
    if fps is not None and (not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0):
        raise _bad_metadata(f"says fps = {fps!r}; it must be a number above 0.")
    if total is not None and (type(total) is not int or total < 1):
        raise _bad_metadata(f"says total_num_frames = {total!r}; it must be a whole number above 0.")
    fps = None if fps is None else float(fps)
    if indices is None:
        return fps, (), total if total is not None and total > count else 0
    recorded = [int(i) for i in indices] if isinstance(indices, list | tuple | np.ndarray) else []
    if len(recorded) != count or min(recorded) < 0 or sorted(recorded) != recorded:
        raise _bad_metadata(f"must have one ascending index in frames_indices for each of the {count} frames.")
    total = max(total or 0, recorded[-1] + 1)
    if total == count:
        return fps, (), 0
    return fps, tuple(recorded), total


def _check_count(count: int, config: MediaConfig) -> None:
    if count > config.max_video_frames:
        raise MediaError(
            f"{count} frames of a video are {config.max_video_frames} at most (max_video_frames). Take fewer: "
            "media_io_kwargs={'video': {'num_frames': n}}.",
            code="video_too_large",
        )


def _bad_metadata(what: str) -> MediaError:
    return MediaError(f"The video's metadata {what}", code="invalid_video_format")


def _wrong(what: str) -> RequestError:
    return RequestError(f"media_io_kwargs: {what}", param="media_io_kwargs")
