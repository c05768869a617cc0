"""Tensors from afar: what is read, and that what is not plain numbers never is."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.errors import MediaError
from opsin.processing.tensor_files import read_tensor_file


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def npy_file(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zip_file(pickled: bytes, stored: bytes = b"\0" * 8, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", stored)
    return buffer.getvalue()


def safetensors_file(header: dict[str, Any], data: bytes = b"\0" * 8) -> bytes:
    told = msgspec.json.encode(header)
    return struct.pack("<Q", len(told)) + told + data


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "tensor",
    [
        numbers(3, 4),
        numbers(1, 3, 4).half(),
        numbers(3, 4).bfloat16(),
        numbers(3, 4).double(),
        numbers(6, 4).chunk(2)[1],
        numbers(4, 3).T,
        torch.tensor([[1, 4, 4]]),
        numbers(300, 4),
    ],
    ids=["float32", "float16", "bfloat16", "float64", "a part", "transposed", "int64", "large"],
)
@pytest.mark.parametrize("write", [torch_file, safetensors.torch.save, npy_file], ids=["torch", "safetensors", "npy"])
def test_tensor_of_every_form_keeps_its_values(tensor: torch.Tensor, write: Callable[[Any], bytes]):
    expected = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    given: Any = tensor
    if write is npy_file:
        given = expected.numpy()
    elif write is safetensors.torch.save:
        given = {"features": tensor.contiguous()}
    read = read_tensor_file(write(given))
    assert isinstance(read, np.ndarray)
    assert read.dtype == expected.numpy().dtype
    np.testing.assert_array_equal(read, expected.numpy())


def test_safetensors_of_several_tensors_are_told_by_name():
    grid = torch.tensor([[1, 2, 2]])
    read = read_tensor_file(safetensors.torch.save({"image_embeds": numbers(1, 4), "image_grid_thw": grid}))
    assert isinstance(read, dict)
    assert read["image_grid_thw"].tolist() == [[1, 2, 2]]


class _Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return open, (self._path, "w")


def test_pickle_in_any_file_is_never_run(tmp_path: Any):
    touched = tmp_path / "touched"
    trap = _Trap(str(touched))
    for data in (
        torch_file({"x": trap}),
        torch_file(trap),
        zip_file(pickle.dumps(trap, protocol=2)),
        pickle.dumps(trap),
        npy_file(np.array([trap], dtype=object)),
    ):
        with pytest.raises(MediaError) as error:
            read_tensor_file(data)
        assert error.value.code == "invalid_image_format"
    assert not touched.exists()


_DENSE = zipfile.ZipFile(io.BytesIO(torch_file(torch.zeros(1, 2)))).read("archive/data.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\x93NUMPY",
        npy_file(np.zeros(2))[:-1],
        npy_file(np.zeros(2, dtype=">f4")),
        npy_file(np.zeros(2, dtype=complex)),
        torch_file([torch.zeros(2)]),
        torch_file(torch.zeros(2, 2).to_sparse()),
        torch_file(torch.zeros(1, 1).expand(1000, 1000)),
        torch_file(torch.zeros(0, 2)),
        torch_file(torch.zeros(2))[:-1],
        zip_file(_DENSE, b"\0" * 4),
        zip_file(_DENSE, compression=zipfile.ZIP_DEFLATED),
        zip_file(b"\x80\x02" + b"(" * 5000),
        zip_file(pickle.dumps(1)),
        safetensors_file({}),
        safetensors_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}),
        safetensors_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 8]}}),
        safetensors_file({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        safetensors_file({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}),
        safetensors_file({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}),
        safetensors_file({f"x{i}": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for i in range(9)}),
        struct.pack("<Q", 2**60) + b"{}",
    ],
)
def test_file_of_anything_else_is_refused(data: bytes):
    with pytest.raises(MediaError, match="Send base64 of a safetensors file"):
        read_tensor_file(data)


@pytest.mark.filterwarnings("ignore:invalid:DeprecationWarning")  # of an escape in a name that breaking made a string
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_broken_file_raises_nothing_else(data: st.DataObject):
    whole = data.draw(
        st.sampled_from(
            [torch_file(numbers(2, 3)), npy_file(np.ones((2, 3))), safetensors.torch.save({"x": numbers(2, 3)})]
        )
    )
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_tensor_file(bytes(broken))
    except MediaError:
        pass
