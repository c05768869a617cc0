"""Which JPEGs may be given to a decoder less patient than Pillow's: whole, plain ones, checked marker by marker.

GPU decoders take few of JPEG's many forms, show grey or garbage where a file is cut short, and run where a mistake of
theirs hurts everybody. What is let through here is baseline, as cameras, phones and libraries write it, from the first
byte to the last. All else is no less a picture, and Pillow's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import zip_longest

_MAX_SEGMENTS = 4096
_SCAN_MARKER = re.compile(rb"\xff[^\x00]")  # in a scan, 0xFF 0x00 stands for the byte 0xFF
_GREY = ((1, 1),)
_SAMPLINGS = (((1, 1), (1, 1), (1, 1)), ((2, 1), (1, 1), (1, 1)), ((2, 2), (1, 1), (1, 1)))
"""4:4:4, 4:2:2 and 4:2:0: blocks of each component across and down, in one unit of the scan."""


class _NotPlainError(Exception):
    pass


@dataclass(slots=True)
class _Tables:
    """What the segments ahead of the scan have said."""

    is_jfif: bool = False
    adobe_transform: int | None = None
    quantization: set[int] = field(default_factory=set[int])
    huffman: set[int] = field(default_factory=set[int])  # class << 4 | id
    restart_interval: int = 0
    components: list[tuple[int, tuple[int, int], int]] = field(default_factory=list[tuple[int, tuple[int, int], int]])
    """Id, blocks across and down, and quantization table of each."""


def is_plain(data: bytes, width: int, height: int) -> bool:
    """A baseline JPEG of this size in 4:4:4, 4:2:2, 4:2:0 or grey, YCbCr if in colour, in one scan, complete, and with
    nothing behind it. Codes and coefficients are not decoded, so they may still be damaged.

    Args:
        width: as the header says, not yet turned as EXIF may want it; likewise ``height``.
    """
    try:
        tables, scan = _read_segments(data, width, height)
        _check_scan(data, scan, tables, width, height)
    except (_NotPlainError, IndexError):
        return False
    return True


def _require(ok: bool) -> None:
    if not ok:
        raise _NotPlainError


def _read_segments(data: bytes, width: int, height: int) -> tuple[_Tables, int]:
    """The segments up to the scan's header, and where the scan itself begins."""
    _require(data[:2] == b"\xff\xd8")
    tables = _Tables()
    at = 2
    for _ in range(_MAX_SEGMENTS):
        _require(data[at] == 0xFF)
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        at += 2 + length
        _require(length >= 2 and len(body) == length - 2)
        match marker:
            case 0xE0:
                tables.is_jfif |= body.startswith(b"JFIF\0")
            case 0xEE if body.startswith(b"Adobe"):
                tables.adobe_transform = body[11]
            case 0xDB:
                _read_quantization(tables, body)
            case 0xC4:
                _read_huffman(tables, body)
            case 0xDD:
                _require(len(body) == 2)
                tables.restart_interval = int.from_bytes(body, "big")
            case 0xC0:
                _read_frame(tables, body, width, height)
            case 0xDA:
                _read_scan_header(tables, body)
                return tables, at
            case _:
                _require(0xE0 <= marker <= 0xEF or marker == 0xFE)  # what applications add, and comments
    raise _NotPlainError


def _read_quantization(tables: _Tables, body: bytes) -> None:
    _require(len(body) % 65 == 0)  # of 8 bits each
    for begin in range(0, len(body), 65):
        _require(body[begin] <= 3 and 0 not in body[begin + 1 : begin + 65])
        tables.quantization.add(body[begin])


def _read_huffman(tables: _Tables, body: bytes) -> None:
    at = 0
    while at < len(body):
        name, counts = body[at], body[at + 1 : at + 17]
        symbols = body[at + 17 : at + 17 + sum(counts)]
        at += 17 + sum(counts)
        _require(name in (0x00, 0x01, 0x10, 0x11) and at <= len(body) and len(symbols) > 0)
        _require(len(set(symbols)) == len(symbols))  # so 256 at most, which is what decoders have room for
        # Bits of a difference between neighbours; behind a run of zeros, those of a coefficient.
        _require(max(symbols) <= 11 if name <= 1 else max(symbol & 15 for symbol in symbols) <= 10)
        # As codes of 16 bits: no more than there are, of which the one of ones alone means nothing.
        _require(sum(count << (15 - i) for i, count in enumerate(counts)) < 1 << 16)
        tables.huffman.add(name)


def _read_frame(tables: _Tables, body: bytes, width: int, height: int) -> None:
    _require(not tables.components)
    _require(body[0] == 8 and body[1:5] == height.to_bytes(2, "big") + width.to_bytes(2, "big"))
    count = body[5]
    _require(len(body) == 6 + 3 * count)
    for id, factors, table in (body[begin : begin + 3] for begin in range(6, len(body), 3)):
        tables.components.append((id, (factors >> 4, factors & 15), table))
    ids = tuple(id for id, _, _ in tables.components)
    sampling = tuple(factors for _, factors, _ in tables.components)
    _require(len(set(ids)) == count and (sampling == _GREY or sampling in _SAMPLINGS))


def _read_scan_header(tables: _Tables, body: bytes) -> None:
    count = len(tables.components)
    _require(count > 0 and body[0] == count and len(body) == 4 + 2 * count and body[-3:] == b"\0\x3f\0")
    for i, (id, _, table) in enumerate(tables.components):
        named, codes = body[1 + 2 * i : 3 + 2 * i]
        _require(named == id and table in tables.quantization)
        _require(codes >> 4 in tables.huffman and 0x10 | codes & 15 in tables.huffman)
    if count == 3:  # what libjpeg takes for YCbCr, and nobody could take for RGB
        ids = tuple(id for id, _, _ in tables.components)
        _require(tables.adobe_transform in (None, 1))
        _require(tables.is_jfif or tables.adobe_transform == 1 or ids == (1, 2, 3))


def _check_scan(data: bytes, begin: int, tables: _Tables, width: int, height: int) -> None:
    """Restart markers are as many as they must be, and in their order; the picture's end is that of the data."""
    _require(data[-2:] == b"\xff\xd9" and len(data) > begin + 2)
    num_restarts = 0
    if tables.restart_interval:
        across, down = tables.components[0][1]
        num_units = -(-width // (8 * across)) * -(-height // (8 * down))
        num_restarts = -(-num_units // tables.restart_interval) - 1
    expected = (*(0xD0 + i % 8 for i in range(num_restarts)), 0xD9)
    found = (marker[0][1] for marker in _SCAN_MARKER.finditer(data, begin))
    # As they come, up to the first wrong one: a hostile file may be all markers.
    _require(all(marker == due for marker, due in zip_longest(found, expected)))
