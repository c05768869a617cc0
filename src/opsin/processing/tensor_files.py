"""Tensors that come over the network: NumPy's .npy, safetensors, and what ``torch.save`` writes for one tensor.

All three are read as data. Nothing is unpickled: the pickle in torch's file is compared, opcode by opcode, with the one
that a dense tensor has, and its numbers are taken; a file that says anything else is refused.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, cast

import msgspec
import numpy as np
import numpy.typing as npt

from opsin.errors import MediaError

Array = npt.NDArray[Any]

_NPY = b"\x93NUMPY"
_NPY_HEADER = re.compile(rb"\{'descr': '(<[fi][248])', 'fortran_order': (False|True), 'shape': \(([\d, ]*)\), \}\s*")
_ZIP = b"PK\x03\x04"
_BFLOAT16 = "bfloat16"
_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": _BFLOAT16, "I64": "<i8", "I32": "<i4"}
_STORAGES = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch BFloat16Storage": _BFLOAT16,
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
}
_MAX_HEADER_BYTES = 2**16
_MAX_PICKLE_BYTES = 2**12
_MAX_ENTRIES = 64
_MAX_TENSORS = 4  # an item's features, and what may stand beside them
_MAX_DIMENSIONS = 8

# The opcodes of torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, OrderedDict()).
_KINDS = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), "int"),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), "text"),
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"), "tuple"),
    **dict.fromkeys(("NEWFALSE", "NEWTRUE"), "bool"),
}
_UNIMPORTANT = frozenset({"PROTO", "BINPUT", "LONG_BINPUT"})
_REBUILD = re.compile(
    "GLOBAL MARK MARK text GLOBAL text text int tuple BINPERSID int( MARK)?((?: int)+) tuple( MARK)?((?: int)+) tuple "
    "bool GLOBAL tuple REDUCE tuple REDUCE STOP"
)


def read_tensor_file(data: bytes) -> Array | dict[str, Array]:
    """The tensor in a file, or the tensors of a safetensors file that has several, by name.

    bfloat16 becomes float32, which holds every value of it.

    Raises:
        MediaError: ``invalid_image_format``: the file is of another kind, or broken.
    """
    try:
        if data.startswith(_NPY):
            return _read_npy(data)
        if data.startswith(_ZIP):
            return _read_torch(data)
        return _read_safetensors(data)
    except (ValueError, struct.error, LookupError, TypeError, msgspec.MsgspecError) as error:
        if isinstance(error, MediaError):
            raise
        _refuse("is broken, or of none of these kinds")


def _refuse(what: str) -> NoReturn:
    raise MediaError(
        f"The file of features {what}. Send base64 of a safetensors file, of a NumPy .npy file, or of what torch.save "
        "writes for one dense tensor, in float32, float16 or bfloat16.",
        code="invalid_image_format",
    )


def _flat(data: memoryview, dtype: str) -> Array:
    """Numbers behind one another."""
    if dtype != _BFLOAT16:
        return np.frombuffer(data, dtype).copy()  # one that may be written to, as torch asks
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def _shaped(flat: Array, shape: Sequence[int], order: Literal["C", "F"] = "C") -> Array:
    """``ValueError`` where their number is not that of the shape."""
    if len(shape) > _MAX_DIMENSIONS or any(n < 0 for n in shape):
        raise ValueError
    return flat.reshape(tuple(shape), order=order)


# ------------------------------------------------------------------------------------------- NumPy, safetensors


def _read_npy(data: bytes) -> Array:
    start, form = (10, "<H") if data[6] == 1 else (12, "<I")
    (length,) = struct.unpack(form, data[8:start])
    header = _NPY_HEADER.fullmatch(data[start : start + min(length, _MAX_HEADER_BYTES)])
    if header is None:
        _refuse("holds something else than plain little-endian numbers")
    shape = [int(n) for n in header[3].split(b",") if n.strip()]
    flat = _flat(memoryview(data)[start + length :], header[1].decode())
    return _shaped(flat, shape, "F" if header[2] == b"True" else "C")


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _read_safetensors(data: bytes) -> Array | dict[str, Array]:
    (length,) = struct.unpack("<Q", data[:8])
    if length > _MAX_HEADER_BYTES:
        raise ValueError
    header = msgspec.json.decode(data[8 : 8 + length], type=dict[str, Any])
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise ValueError
    body = memoryview(data)[8 + length :]
    found: dict[str, Array] = {}
    for name, told in header.items():
        entry = msgspec.convert(told, _Entry)
        begin, end = entry.data_offsets
        if not 0 <= begin <= end <= len(body):
            raise ValueError
        found[name] = _shaped(_flat(body[begin:end], _SAFETENSORS[entry.dtype]), entry.shape)
    if not found:
        raise ValueError
    return next(iter(found.values())) if len(found) == 1 else found


# --------------------------------------------------------------------------------------------------------- torch


def _read_torch(data: bytes) -> Array:
    entries = _zip_entries(data)
    folder = next((name.rpartition("/")[0] for name in entries if name.endswith("/data.pkl")), None)
    if folder is None or entries.get(f"{folder}/byteorder", b"little") != b"little":
        _refuse("is a ZIP archive that torch.save did not write on a machine like this")
    dtype, key, offset, size, stride = _read_pickle(bytes(entries[f"{folder}/data.pkl"][: _MAX_PICKLE_BYTES + 1]))
    stored = _flat(entries[f"{folder}/data/{key}"], dtype)
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS or min(*size, *stride, offset) < 0:
        raise ValueError
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size or last >= len(stored) or math.prod(size) > len(stored):  # expanded ones would grow
        raise ValueError
    strides = [step * stored.itemsize for step in stride]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(stored[offset:], size, strides))


def _read_pickle(pickle: bytes) -> tuple[str, str, int, list[int], list[int]]:
    """Dtype, name of the storage, offset, size and stride of the tensor that a pickle would build."""
    if len(pickle) > _MAX_PICKLE_BYTES:
        raise ValueError
    steps = [(op.name, arg) for op, arg, _ in pickletools.genops(pickle) if op.name not in _UNIMPORTANT]
    match = _REBUILD.fullmatch(" ".join(_KINDS.get(name, name) for name, _ in steps))
    names = [cast(str, arg) for name, arg in steps if name == "GLOBAL"]
    if match is None or names[0] != "torch._utils _rebuild_tensor_v2" or names[1] not in _STORAGES:
        _refuse("holds something else than one dense tensor")
    texts = [cast(str, arg) for name, arg in steps if _KINDS.get(name) == "text"]
    numbers = [cast(int, arg) for name, arg in steps if _KINDS.get(name) == "int"]
    num_sizes = match[2].count("int")
    return _STORAGES[names[1]], texts[1], numbers[1], numbers[2 : 2 + num_sizes], numbers[2 + num_sizes :]


def _zip_entries(data: bytes) -> Mapping[str, memoryview]:
    """The files of an archive whose entries are stored as they are, as torch's are; no other is looked into."""
    sign, _, _, _, count, length, at, comment = struct.unpack("<4sHHHHIIH", data[-22:])
    if sign != b"PK\x05\x06" or comment or count > _MAX_ENTRIES or length > _MAX_HEADER_BYTES:
        raise ValueError
    entries: dict[str, memoryview] = {}
    for _ in range(count):
        head = struct.unpack("<4s6H3I5H2I", data[at : at + 46])
        method, size, name_length, begin = head[4], head[9], head[10], head[16]
        if head[0] != b"PK\x01\x02" or method != 0:
            raise ValueError
        name = data[at + 46 : at + 46 + name_length].decode()
        at += 46 + name_length + head[11] + head[12]
        begin += 30 + sum(struct.unpack("<HH", data[begin + 26 : begin + 30]))
        if begin + size > len(data):
            raise ValueError
        entries[name] = memoryview(data)[begin : begin + size]
    return entries
