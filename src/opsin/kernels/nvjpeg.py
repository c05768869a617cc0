"""JPEG decoding by NVIDIA's nvJPEG, called through ctypes: from bytes on the host to uint8 RGB on the device.

On data-centre GPUs from the A100 on, decoders beside the multiprocessors do it, through the driver's video library.
Elsewhere codes are read by the calling thread and the rest is done by kernels. Pixels are not Pillow's to the last bit,
since the inverse cosine transform and the rounding of colours are others; chroma is interpolated, as libjpeg does it.
On an H100 (nvJPEG 13.3, Pillow 12.3) no value of the hardware's was more than 1 of 255 off, and hardly any at all; of
the kernels' none more than 3, and 0.03 in the mean.

nvJPEG reads strangers' bytes in this process. What it is given here should have been checked (``media.jpeg``).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from opsin.errors import ConfigError

Backend = Literal["hardware", "gpu_hybrid", "hybrid"]

MAX_BATCH = 32
MAX_BATCH_PIXELS = 2**25
WORKSPACE_BYTES = 3 * 2**27
"""Device memory for nvJPEG's own buffers, at such a batch: coefficients and planes of chroma, in and out.

An H100's hardware took 115 MiB, the kernels 347 in batches of twice as many pictures of 1024x768.
"""

_BACKENDS: dict[Backend, int] = {"hybrid": 1, "gpu_hybrid": 2, "hardware": 3}
_INTERLEAVED_RGB = 5
_INTERPOLATED_CHROMA = 1 << 5  # else each value is repeated
_STATUS = (
    *("success", "not initialized", "invalid parameter", "bad JPEG", "JPEG not supported", "allocator failure"),
    *("execution failed", "arch mismatch", "internal error", "implementation not supported", "incomplete bitstream"),
)


class _Planes(ctypes.Structure):
    _fields_ = (("channel", c_void_p * 4), ("pitch", c_size_t * 4))


_HANDLE = POINTER(c_void_p)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "nvjpegCreateEx": (c_int, c_void_p, c_void_p, c_uint, _HANDLE),
    "nvjpegDestroy": (c_void_p,),
    "nvjpegJpegStateCreate": (c_void_p, _HANDLE),
    "nvjpegJpegStateDestroy": (c_void_p,),
    "nvjpegJpegStreamCreate": (c_void_p, _HANDLE),
    "nvjpegJpegStreamDestroy": (c_void_p,),
    "nvjpegJpegStreamParseHeader": (c_void_p, c_char_p, c_size_t, c_void_p),
    "nvjpegJpegStreamGetFrameDimensions": (c_void_p, POINTER(c_uint), POINTER(c_uint)),
    "nvjpegDecodeBatchedSupported": (c_void_p, c_void_p, POINTER(c_int)),
    "nvjpegDecodeBatchedInitialize": (c_void_p, c_void_p, c_int, c_int, c_int),
    "nvjpegDecodeBatched": (c_void_p, c_void_p, POINTER(c_char_p), POINTER(c_size_t), POINTER(_Planes), c_void_p),
}


class Jpeg(NamedTuple):
    """A JPEG's bytes, and the size that its header says."""

    data: bytes
    width: int
    height: int


def load_library(cuda: str | None = torch.version.cuda) -> Any:
    """libnvjpeg of torch's CUDA, from the wheel that NVIDIA publishes or from the loader's path.

    Args:
        cuda: the version of CUDA that torch was built for.

    Raises:
        ConfigError: there is none.
    """
    if cuda is None:
        raise ConfigError("JPEGs can be decoded on a GPU only where torch has been built for CUDA; this one has not.")
    major = cuda.partition(".")[0]
    name = f"libnvjpeg.so.{major}"
    for path in (*_installed(name, major), name):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    wheel = "'opsin[nvjpeg]'" if major == "13" else f"nvidia-nvjpeg-cu{major}"
    raise ConfigError(f"{name}, which decodes JPEGs on the GPU, is not found. Install it: pip install {wheel}")


def _installed(name: str, major: str) -> Iterator[str]:
    """Where wheels put it: those for CUDA 13 all into one folder, earlier ones each into its own."""
    spec = importlib.util.find_spec("nvidia")
    for root in () if spec is None else spec.submodule_search_locations or ():
        for folder in (f"cu{major}", "nvjpeg"):
            path = Path(root, folder, "lib", name)
            if path.exists():
                yield str(path)


class JpegDecoder:
    """Decodes batches, for one thread.

    Args:
        library: as ``load_library`` returns it.
        stream: all work is queued there; None where a stand-in for the library works on the host.
        backends: the first one that the GPU has is used.

    Attributes:
        backend: the one in use.

    Raises:
        ConfigError: none of them can be had.
    """

    def __init__(
        self,
        library: Any,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        *,
        backends: Sequence[Backend] = ("hardware", "gpu_hybrid"),
    ) -> None:
        for name, arguments in _PROTOTYPES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
        self._library = library
        self._device = device
        self._stream = stream
        self._handle, self._state, self._header = c_void_p(), c_void_p(), c_void_p()
        self._batch_size = 0  # that the state is ready for
        self.backend = self._create(backends)
        for status in (
            library.nvjpegJpegStateCreate(self._handle, byref(self._state)),
            library.nvjpegJpegStreamCreate(self._handle, byref(self._header)),
        ):
            if status:
                raise ConfigError(f"nvJPEG cannot be used here: {_said(status)}.")

    def decode(self, jpegs: Sequence[Jpeg]) -> list[torch.Tensor | None]:
        """uint8 (height, width, 3), RGB, of each on the device; waits for it.

        None for those that nvJPEG does not take, or finds another size or damage in; the others come all the same.
        """
        with torch.cuda.stream(self._stream):
            # Zeros: where a damaged file ends too early, nobody may see what was in that memory before.
            made: list[torch.Tensor | None] = [
                torch.zeros(jpeg.height, jpeg.width, 3, dtype=torch.uint8, device=self._device)
                if self._takes(jpeg)
                else None
                for jpeg in jpegs
            ]
            todo = [(jpeg, picture) for jpeg, picture in zip(jpegs, made, strict=True) if picture is not None]
            failed: list[torch.Tensor] = []
            if not self._run(todo):
                failed = [pair[1] for pair in todo if len(todo) == 1 or not self._run([pair])]
        if self._stream is not None:
            self._stream.synchronize()
        return [None if any(picture is one for one in failed) else picture for picture in made]

    def close(self) -> None:
        """Free what the library holds; the decoder is of no use any more."""
        if not self._handle:
            return
        self._library.nvjpegJpegStreamDestroy(self._header)
        self._library.nvjpegJpegStateDestroy(self._state)
        self._library.nvjpegDestroy(self._handle)
        self._handle = c_void_p()

    def _create(self, backends: Sequence[Backend]) -> Backend:
        reasons: list[str] = []
        for backend in backends:
            status = self._library.nvjpegCreateEx(
                _BACKENDS[backend], None, None, _INTERPOLATED_CHROMA, byref(self._handle)
            )
            if not status:
                return backend
            reasons.append(f"{backend}: {_said(status)}")
        raise ConfigError(f"nvJPEG cannot be used here ({'; '.join(reasons)}).")

    def _takes(self, jpeg: Jpeg) -> bool:
        """The backend decodes this form, and to the size that there is room for."""
        width, height, refused = c_uint(), c_uint(), c_int(1)
        library, header = self._library, self._header
        return (
            not library.nvjpegJpegStreamParseHeader(self._handle, jpeg.data, len(jpeg.data), header)
            and not library.nvjpegJpegStreamGetFrameDimensions(header, byref(width), byref(height))
            and not library.nvjpegDecodeBatchedSupported(self._handle, header, byref(refused))
            and (width.value, height.value) == (jpeg.width, jpeg.height)
            and not refused.value
        )

    def _run(self, pairs: Sequence[tuple[Jpeg, torch.Tensor]]) -> bool:
        """Queue one batch. One that fails fails whole, and leaves the state to be made ready again."""
        size = len(pairs)
        if not size:
            return True
        if size != self._batch_size:
            self._batch_size = 0
            if self._library.nvjpegDecodeBatchedInitialize(self._handle, self._state, size, 1, _INTERLEAVED_RGB):
                return False
        planes = (_Planes * size)()
        for plane, (jpeg, picture) in zip(planes, pairs, strict=True):
            plane.channel[0], plane.pitch[0] = picture.data_ptr(), 3 * jpeg.width
        data = (c_char_p * size)(*(jpeg.data for jpeg, _ in pairs))
        lengths = (c_size_t * size)(*(len(jpeg.data) for jpeg, _ in pairs))
        stream = None if self._stream is None else self._stream.cuda_stream
        status = self._library.nvjpegDecodeBatched(self._handle, self._state, data, lengths, planes, stream)
        self._batch_size = 0 if status else size
        return not status


def _said(status: int) -> str:
    return _STATUS[status] if 0 <= status < len(_STATUS) else f"status {status}"
