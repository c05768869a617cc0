"""What the front and its engine process say to one another. Large pictures go beside the messages, in shared memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from opsin.config import EngineConfig
from opsin.engine.engine import EngineFacts
from opsin.engine.histogram import Histogram
from opsin.media.clips import EncodedVideo, FrameSequence
from opsin.media.decode import AlphaMode
from opsin.media.sniff import ImageHeader
from opsin.media.source import EncodedPicture, PixelPicture
from opsin.media.video import VideoHeader
from opsin.media.wire import map_memory, share
from opsin.processing.embeddings import GivenFeatures
from opsin.processing.prompts import MediaSource
from opsin.types import Clip, EngineRequest, RequestUpdate


class SourceHead(msgspec.Struct, frozen=True, array_like=True):
    """One ``MediaSource``; its bytes are ``data``, or lie behind one another in the memory that comes along."""

    kind: Literal["encoded", "pixels", "video", "frames", "features"]
    num_bytes: int
    digest: bytes
    alpha: AlphaMode = "white"
    header: ImageHeader | None = None
    shape: tuple[int, ...] = ()
    dtype: str = "uint8"
    extras: Mapping[str, tuple[int, ...]] = {}
    video: VideoHeader | None = None
    clip: Clip | None = None
    data: bytes = b""


class Load(msgspec.Struct, frozen=True, tag=True):
    """The first message: what to be. ``log_level`` is the front's."""

    config: EngineConfig
    log_level: int


class Add(msgspec.Struct, frozen=True, tag=True):
    """Run the samples of one prompt."""

    requests: list[EngineRequest]
    sources: list[SourceHead]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request."""

    request_id: str


ToEngine = Load | Add | Abort


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded."""

    facts: EngineFacts


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """It is not. ``error`` is the name of the class in ``opsin.errors``."""

    error: str
    message: str


class News(msgspec.Struct, frozen=True, tag=True):
    """What steps did."""

    updates: list[RequestUpdate]


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The process is alive. Sent several times a second, by a thread that no step holds up.

    Attributes:
        step_begun_s: when the step that runs was begun, on the machine's monotonic clock.
    """

    step_begun_s: float | None
    stats: dict[str, float]
    histograms: dict[str, Histogram]


FromEngine = Loaded | LoadFailed | News | Beat


_MAX_INLINE_BYTES = 2**18  # fewer are copied in less time than memory is made, mapped twice, and taken away


def pack_sources(sources: Sequence[MediaSource]) -> tuple[list[SourceHead], int | None]:
    """The sources' heads, and the descriptor of shared memory with their bytes; None where the heads have these.

    Raises:
        MediaError: a picture object cannot be converted to RGB.
    """
    heads: list[SourceHead] = []
    parts: list[bytes | memoryview] = []
    for source in sources:
        data, head = _packed(source)
        heads.append(head)
        parts.append(data)
    num_bytes = sum(head.num_bytes for head in heads)
    if num_bytes <= _MAX_INLINE_BYTES:
        return [msgspec.structs.replace(h, data=bytes(part)) for h, part in zip(heads, parts, strict=True)], None
    return heads, share(*parts)


def unpack_sources(heads: Sequence[SourceHead], descriptor: int | None) -> list[MediaSource]:
    """What ``pack_sources`` packed; the descriptor is closed."""
    if descriptor is None:
        return [_unpacked(head, head.data) for head in heads]
    try:
        memory = map_memory(descriptor, sum(head.num_bytes for head in heads))
    finally:
        os.close(descriptor)
    with memory:  # copied out, since older Pythons keep a descriptor for as long as a mapping
        return [_unpacked(head, memory.read(head.num_bytes)) for head in heads]


def _packed(source: MediaSource) -> tuple[bytes | memoryview, SourceHead]:
    if isinstance(source, EncodedPicture):
        return source.data, SourceHead("encoded", len(source.data), source.digest, source.alpha, source.header)
    if isinstance(source, PixelPicture):
        array: np.ndarray[Any, Any] = np.asarray(source.decode())
        head = SourceHead("pixels", array.nbytes, source.digest, source.alpha, shape=array.shape)
    elif isinstance(source, EncodedVideo):
        head = SourceHead("video", len(source.data), source.digest, video=source.header, clip=source.clip)
        return source.data, head
    elif isinstance(source, FrameSequence):
        array = np.stack([np.asarray(frame) for frame in source.frames(range(len(source.pictures)))])
        head = SourceHead("frames", array.nbytes, source.digest, shape=array.shape, clip=source.clip)
    else:
        array = source.data
        shape, dtype = array.shape, str(array.dtype)
        head = SourceHead("features", array.nbytes, source.digest, shape=shape, dtype=dtype, extras=source.extras)
    return np.ascontiguousarray(array).data.cast("B"), head


def _unpacked(head: SourceHead, data: bytes) -> MediaSource:
    if head.kind == "encoded":
        assert head.header is not None
        return EncodedPicture(data, head.header, head.digest, head.alpha)
    if head.kind == "video":
        assert head.video is not None
        assert head.clip is not None
        return EncodedVideo(data, head.video, head.clip, head.digest)
    array = np.frombuffer(data, head.dtype).reshape(head.shape)
    if head.kind == "frames":
        assert head.clip is not None
        size = (head.shape[2], head.shape[1])
        return FrameSequence([PixelPicture(a, size, head.digest, head.alpha) for a in array], head.clip, head.digest)
    if head.kind == "pixels":
        return PixelPicture(array, (head.shape[1], head.shape[0]), head.digest, head.alpha)
    return GivenFeatures(array.copy(), head.digest, head.extras)  # one that may be written to, as torch asks
