"""What the pool and its workers say to one another, and the shared memory that the pictures travel in.

Messages are length-prefixed msgpack on a unix stream socket; never pickle, since a worker has read hostile bytes.
Pictures and tiles lie in anonymous shared memory whose descriptors ride along with the message.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec
from PIL import Image

from opsin.errors import MediaError
from opsin.media.decode import AlphaMode
from opsin.media.ops import PixelArray, make_frames
from opsin.media.sniff import ImageHeader
from opsin.media.source import Noun
from opsin.media.video import VideoFormat, VideoHeader
from opsin.types import PixelPlan

T = TypeVar("T")

KEPT_BYTES = 2**23
"""Memory that the pool and a worker share while the worker lives, and that jobs which fit go through: making pages of
new memory takes as long as decoding a picture into it."""

_MAX_MESSAGE_BYTES = 2**24


class Job(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Make the plan's tiles.

    Two descriptors come beside it: the source's memory, and the tiles'. Or else the source lies behind the tiles' place
    in memory that is kept, and the one descriptor is that memory's, or there is none: it came with an earlier job.

    Attributes:
        picture: the header of an encoded picture; likewise ``video``. Without either, the source is raw RGB of the
            plan's size, one distinct frame after the other.
        num_bytes: the source's.
    """

    plan: PixelPlan
    picture: ImageHeader | None
    video: VideoHeader | None
    alpha: AlphaMode
    num_bytes: int

    @property
    def fits(self) -> bool:
        """Into memory that is kept."""
        return self.plan.num_bytes + self.num_bytes <= KEPT_BYTES


class Probe(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Read a video's header. One descriptor comes beside it: the video's memory, of ``num_bytes``."""

    format: VideoFormat
    max_pixels: int
    num_bytes: int


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """It is done, or what is wrong with the picture or video. A worker's first one says that it is ready."""

    error: str | None = None
    code: str | None = None
    header: VideoHeader | None = None


def carry_out(
    decode: Callable[[], Iterable[Image.Image]], plan: PixelPlan, out: PixelArray, noun: Noun = "picture"
) -> Reply:
    """Decode and cut one item; whatever is wrong with it comes back as text, so that no traceback holds pixels."""
    return replying(lambda: make_frames(decode(), plan, out), noun)


def replying(work: Callable[[], VideoHeader | None], noun: Noun) -> Reply:
    """Do something; what it returns, or what is wrong."""
    try:
        return Reply(header=work())
    except MediaError as error:
        return Reply(str(error), error.code)
    except MemoryError:
        code = "image_too_large" if noun == "picture" else "video_too_large"
        return Reply(f"There is not enough memory to decode the {noun}.", code)


def send(connection: socket.socket, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
    """Send one message; the descriptors are duplicated into the receiving process."""
    body = msgspec.msgpack.encode(message)
    frame = len(body).to_bytes(4, "little") + body
    sent = socket.send_fds(connection, [frame], descriptors)
    connection.sendall(frame[sent:])


def receive(connection: socket.socket, kind: type[T], num_descriptors: int = 0) -> tuple[T, list[int]]:
    """Receive one message.

    Raises:
        EOFError: the other end is gone.
        msgspec.MsgspecError: the message is not of this kind.
    """
    prefix, descriptors, _, _ = socket.recv_fds(connection, 4, num_descriptors)
    prefix += _receive_exactly(connection, 4 - len(prefix)) if prefix else b""
    length = int.from_bytes(prefix, "little")
    if not prefix or length > _MAX_MESSAGE_BYTES:
        raise EOFError
    try:
        return msgspec.msgpack.decode(_receive_exactly(connection, length), type=kind), descriptors
    except RecursionError:  # nested without end, in a field that nobody asked for
        raise msgspec.DecodeError("The message is nested too deeply.") from None


def allocate(num_bytes: int) -> tuple[int, mmap.mmap]:
    """Shared memory without a name: its descriptor, and this process's mapping. It is freed with its last user.

    It is sealed against resizing, so that no worker can pull pages away from under the reader.
    """
    descriptor = os.memfd_create("opsin-media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return descriptor, map_memory(descriptor, num_bytes)
    except BaseException:
        os.close(descriptor)
        raise


def share(*parts: bytes | bytearray | memoryview) -> int:
    """The descriptor of shared memory that holds the parts, one behind the other.

    Copying into a mapping makes its pages one by one and lets no other thread run meanwhile; writing does neither.
    """
    descriptor, memory = allocate(sum(memoryview(part).nbytes for part in parts))
    try:
        memory.close()
        at = 0
        for part in parts:
            rest = memoryview(part)
            while rest:
                written = os.pwrite(descriptor, rest, at)
                at, rest = at + written, rest[written:]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def map_memory(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Map shared memory; the descriptor may be closed at once."""
    if sys.version_info >= (3, 13):  # older Pythons keep one duplicate of the descriptor for as long as the mapping
        return mmap.mmap(descriptor, num_bytes, trackfd=False)
    return mmap.mmap(descriptor, num_bytes)


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    parts: list[bytes] = []
    while length > 0:
        part = connection.recv(length)
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
