"""Pillow behind nvJPEG's C interface, on the host: the same calls in the same order, pointers and all."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable
from ctypes import POINTER, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import numpy as np
from PIL import Image

SUCCESS, INVALID_PARAMETER, BAD_JPEG, ARCH_MISMATCH = 0, 2, 3, 7
_HARDWARE, _RGBI = 3, 5


class _Planes(ctypes.Structure):  # as nvjpeg.h has it
    _fields_ = (("channel", c_void_p * 4), ("pitch", c_size_t * 4))


class StandIn:
    """A library object as ``ctypes.CDLL`` makes one.

    Args:
        has_hardware: else that backend is refused.
        damaged: tells of a file's bytes that they cannot be decoded, which the header does not show.
        refused: tells of a file's bytes that the backend does not take their form.
    """

    def __init__(
        self,
        *,
        has_hardware: bool = True,
        damaged: Callable[[bytes], bool] = lambda data: False,
        refused: Callable[[bytes], bool] = lambda data: False,
    ) -> None:
        self.created: list[int] = []
        self.flags: set[int] = set()
        self.batches: list[int] = []
        self.open_handles: set[int] = set()
        self._has_hardware, self._damaged, self._refused = has_hardware, damaged, refused
        self._ready_for: int | None = None
        self._header = (b"", 0, 0)
        pointers: dict[str, tuple[Any, ...]] = {
            "CreateEx": (c_int, c_void_p, c_void_p, c_uint, POINTER(c_void_p)),
            "Destroy": (c_void_p,),
            "JpegStateCreate": (c_void_p, POINTER(c_void_p)),
            "JpegStateDestroy": (c_void_p,),
            "JpegStreamCreate": (c_void_p, POINTER(c_void_p)),
            "JpegStreamDestroy": (c_void_p,),
            "JpegStreamParseHeader": (c_void_p, c_void_p, c_size_t, c_void_p),
            "JpegStreamGetFrameDimensions": (c_void_p, POINTER(c_uint), POINTER(c_uint)),
            "DecodeBatchedSupported": (c_void_p, c_void_p, POINTER(c_int)),
            "DecodeBatchedInitialize": (c_void_p, c_void_p, c_int, c_int, c_int),
            "DecodeBatched": (c_void_p, c_void_p, POINTER(c_void_p), POINTER(c_size_t), POINTER(_Planes), c_void_p),
        }
        for name, arguments in pointers.items():
            setattr(self, "nvjpeg" + name, ctypes.CFUNCTYPE(c_int, *arguments)(getattr(self, "_" + name)))

    def _open(self, out: Any) -> int:
        out[0] = 0x1000 + len(self.open_handles)
        self.open_handles.add(out[0])
        return SUCCESS

    def _close(self, handle: int) -> int:
        self.open_handles.remove(handle)
        return SUCCESS

    def _CreateEx(self, backend: int, device: Any, pinned: Any, flags: int, out: Any) -> int:
        self.created.append(backend)
        self.flags.add(flags)
        return ARCH_MISMATCH if backend == _HARDWARE and not self._has_hardware else self._open(out)

    def _JpegStateCreate(self, handle: int, out: Any) -> int:
        return self._open(out)

    def _JpegStreamCreate(self, handle: int, out: Any) -> int:
        return self._open(out)

    def _Destroy(self, handle: int) -> int:
        return self._close(handle)

    def _JpegStateDestroy(self, state: int) -> int:
        return self._close(state)

    def _JpegStreamDestroy(self, stream: int) -> int:
        return self._close(stream)

    def _JpegStreamParseHeader(self, handle: int, data: int, length: int, stream: int) -> int:
        assert {handle, stream} <= self.open_handles
        encoded = ctypes.string_at(data, length)
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                self._header = encoded, image.width, image.height
        except OSError:
            return BAD_JPEG
        return SUCCESS

    def _JpegStreamGetFrameDimensions(self, stream: int, width: Any, height: Any) -> int:
        _, width[0], height[0] = self._header
        return SUCCESS

    def _DecodeBatchedSupported(self, handle: int, stream: int, is_refused: Any) -> int:
        is_refused[0] = int(self._refused(self._header[0]))
        return SUCCESS

    def _DecodeBatchedInitialize(self, handle: int, state: int, size: int, num_threads: int, form: int) -> int:
        assert (form, num_threads) == (_RGBI, 1)
        self._ready_for = size
        return SUCCESS

    def _DecodeBatched(self, handle: int, state: int, datas: Any, lengths: Any, planes: Any, stream: Any) -> int:
        if self._ready_for is None:
            return INVALID_PARAMETER
        assert {handle, state} <= self.open_handles
        assert stream is None
        self.batches.append(self._ready_for)
        for i in range(self._ready_for):
            encoded = ctypes.string_at(datas[i], lengths[i])
            if self._damaged(encoded):
                self._ready_for = None
                return BAD_JPEG
            with Image.open(io.BytesIO(encoded)) as image:
                pixels = np.asarray(image.convert("RGB"))
            assert planes[i].pitch[0] == 3 * pixels.shape[1]
            ctypes.memmove(planes[i].channel[0], pixels.tobytes(), pixels.nbytes)
        return SUCCESS
