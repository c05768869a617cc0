"""Features that a caller computed, in place of a picture: read, checked, and split into items.

torch tensors are recognised by what they can do, so torch is never imported here.
"""

# What is read here comes from callers, so it is Any until it was looked at.
# pyright: standard

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from opsin.errors import MediaError, RequestError
from opsin.media.fetch import decode_data_url
from opsin.processing.tensor_files import read_tensor_file

_EXTRA_KEYS = {"grid_thw": "{m}_grid_thw", "sizes": "{m}_sizes", "size_list": "{m}_size_list"}


@dataclass(frozen=True, slots=True)
class GivenFeatures:
    """One item's features.

    Attributes:
        data: (features, feature width), float32 or float16.
        extras: what was given beside them, as plain numbers: ``image_grid_thw`` (t, h, w), ``image_sizes``, two
            numbers in the order that the family's processor gives them: (h, w) but for MiniCPM-V's.
        digest: BLAKE2b-256 of the numbers.
    """

    data: npt.NDArray[np.floating[Any]]
    digest: bytes
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def is_embedding(value: Any) -> bool:
    """Whether a value is features rather than a picture: a torch tensor, or a 2-D array of floats."""
    if _is_tensor(value):
        return True
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind == "f"


def read_embedding(
    value: Any, width: int, param: str | None = None, extras: Mapping[str, tuple[int, ...]] | None = None
) -> GivenFeatures:
    """One item's features, (features, width) or (1, features, width).

    Raises:
        MediaError: wrong shape or dtype, sparse, or not finite.
    """
    array = _to_array(value, param)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    _check(array, 2, width, param)
    array = array.astype(np.float16 if array.dtype == np.float16 else np.float32, copy=False)
    digest = hashlib.blake2b(digest_size=32, person=b"embedding")
    digest.update(f"{array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data.cast("B"))
    return GivenFeatures(array, digest.digest(), extras or {})


def open_embedding(value: Any, width: int, max_bytes: int, param: str) -> GivenFeatures:
    """The features of one item of a conversation, in any form that a part may have them.

    Args:
        value: a tensor; text, the base64 of a file that ``tensor_files`` reads; or a dict of these with grids or sizes.
        max_bytes: of such a file.

    Raises:
        RequestError, MediaError: it cannot be read, or holds the features of several items.
    """
    if isinstance(value, str):
        value = _decode(value, max_bytes, param)
    if not isinstance(value, Mapping):
        return read_embedding(value, width, param)
    decoded = {k: _decode(v, max_bytes, f"{param}.{k}") if isinstance(v, str) else v for k, v in value.items()}
    items = read_embeddings("image", decoded, width, param)
    if len(items) != 1:
        raise MediaError(f"A part holds the features of one picture; this one has {len(items)}.", param=param)
    return items[0]


def split_embeddings(value: Any, width: int, param: str | None = None) -> list[GivenFeatures]:
    """Items of a tensor (items, features, width), or one of (features, width)."""
    array = _to_array(value, param)
    if array.ndim == 2:
        return [read_embedding(array, width, param)]
    _check(array, 3, width, param)
    return [read_embedding(item, width, param) for item in array]


def read_embeddings(modality: str, data: Mapping[str, Any], width: int, param: str) -> list[GivenFeatures]:
    """Items of ``{"image_embeds": ..., "image_grid_thw" | "image_sizes" | "image_size_list": ...}``.

    Rows that are not yet split into items, (sum of features, width), are shared out in proportion to the grids.
    """
    name = f"{modality}_embeds"
    spelled = {key.format(m=modality): kind for kind, key in _EXTRA_KEYS.items()}
    unknown = sorted(str(key) for key in data if key != name and key not in spelled)
    if unknown or name not in data:
        wrong = f"unknown {', '.join(unknown)}" if unknown else f"no {name!r}"
        raise RequestError(
            f"{param} is a dict with {wrong}. Features are given as {{{name!r}: tensor}}, with "
            f"{' or '.join(repr(s) for s in spelled)} where the model needs it.",
            param=f"{param}.{unknown[0]}" if unknown else param,
        )
    extras = _read_extras(modality, data, spelled, param)
    value = data[name]
    if isinstance(value, list | tuple):
        arrays = [_to_array(v, f"{param}.{name}") for v in value]
    else:
        array = _to_array(value, f"{param}.{name}")
        _check(array, array.ndim if array.ndim in (2, 3) else 3, width, f"{param}.{name}")
        arrays = list(array) if array.ndim == 3 else _share_out(array, extras, f"{param}.{name}")
    if extras and len(extras) != len(arrays):
        raise MediaError(
            f"{param} has features of {len(arrays)} item(s) but sizes or grids of {len(extras)}; they must agree.",
            param=param,
        )
    beside = extras or [{}] * len(arrays)
    return [read_embedding(a, width, f"{param}.{name}", e) for a, e in zip(arrays, beside, strict=True)]


# ------------------------------------------------------------------------------------------------------ inside


def _decode(text: str, max_bytes: int, param: str) -> npt.NDArray[Any] | dict[str, npt.NDArray[Any]]:
    url = text if text[:5].lower() == "data:" else f"data:;base64,{text}"
    try:
        return read_tensor_file(decode_data_url(url, max_bytes))
    except MediaError as error:
        if error.code == "invalid_base64_image":
            error = MediaError("The features are not valid base64.", code=error.code)
        error.param = param
        raise error from None


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "is_floating_point")


def _to_array(value: Any, param: str | None) -> npt.NDArray[Any]:
    if _is_tensor(value):
        if str(value.layout) != "torch.strided":
            raise MediaError(f"Features must be a dense tensor, got layout {value.layout}.", param=param)
        try:
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # NumPy has none; float32 holds every value of it
                value = value.float()
            return value.numpy(force=True)
        except (RuntimeError, TypeError):  # a meta tensor, a quantised one, an 8-bit dtype
            raise MediaError(
                f"Features of {value.dtype} on device {value.device.type!r} cannot be read; give a float32, float16 or "
                "bfloat16 tensor.",
                param=param,
            ) from None
    if isinstance(value, np.ndarray):
        return value
    raise MediaError(f"Features must be a torch tensor or a NumPy array, got {type(value).__name__}.", param=param)


def _check(array: npt.NDArray[Any], ndim: int, width: int, param: str | None) -> None:
    form = "(features, hidden size)" if ndim == 2 else "(items, features, hidden size)"
    if array.ndim != ndim or 0 in array.shape:
        raise MediaError(f"Features must have shape {form} and not be empty, got {array.shape}.", param=param)
    if array.dtype.kind != "f":
        raise MediaError(f"Features must be floating-point numbers, got {array.dtype}.", param=param)
    if array.shape[-1] != width:
        raise MediaError(
            f"Features have {array.shape[-1]} values per row; this model's have {width}. Use the output of this "
            "model's own vision tower and projector.",
            param=param,
        )
    if not (np.abs(array) <= np.finfo(np.float32).max).all():  # false for NaN, too
        raise MediaError("Features hold values that are not finite (NaN or infinity) in float32.", param=param)


def _read_extras(
    modality: str, data: Mapping[str, Any], spelled: Mapping[str, str], param: str
) -> list[dict[str, tuple[int, ...]]]:
    """Per item, the numbers given beside its features."""
    extras: list[dict[str, tuple[int, ...]]] = []
    for key, kind in spelled.items():
        if data.get(key) is None:
            continue
        rows = data[key].tolist() if hasattr(data[key], "tolist") else data[key]
        length = 3 if kind == "grid_thw" else 2
        if isinstance(rows, Sequence) and rows and not isinstance(rows[0], Sequence):
            rows = [rows]
        if not isinstance(rows, Sequence) or not all(
            isinstance(r, Sequence) and len(r) == length and all(type(n) is int and n > 0 for n in r) for r in rows
        ):
            raise RequestError(f"{key} must have {length} positive whole numbers per item.", param=f"{param}.{key}")
        name = f"{modality}_grid_thw" if kind == "grid_thw" else f"{modality}_sizes"
        extras = extras or [{} for _ in rows]
        if len(extras) != len(rows):
            raise RequestError(f"{key} has {len(rows)} rows, expected {len(extras)}.", param=f"{param}.{key}")
        for item, row in zip(extras, rows, strict=True):
            item[name] = tuple(row)
    return extras


def _share_out(
    rows: npt.NDArray[Any], extras: Sequence[Mapping[str, tuple[int, ...]]], param: str
) -> list[npt.NDArray[Any]]:
    if len(extras) <= 1:
        return [rows]
    cells = [next((math.prod(v) for k, v in item.items() if k.endswith("grid_thw")), 0) for item in extras]
    total = sum(cells)
    counts = [len(rows) * c // total if total else 0 for c in cells]
    if not all(cells) or any(len(rows) * c % total for c in cells):
        raise MediaError(
            f"{len(rows)} feature rows cannot be shared out among {len(extras)} items by their grids. "
            "Give (items, features, hidden size), a list of tensors, or rows that fit the grids.",
            param=param,
        )
    return np.split(rows, np.cumsum(counts)[:-1])
