"""Filling a model's parameters: from safetensors, strictly, or at random.

Every tensor of a checkpoint must find its place or be declared unused, and every parameter must be filled exactly
once. Tensors go from the mapped file to the parameter's device and dtype one at a time. Pickled weights can run code
when they are opened, so they are refused.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from opsin.errors import WeightError
from opsin.kernels.quantized import FP8, INT8, quantize_weight
from opsin.layers.embedding import LMHead
from opsin.layers.linear import Linear, MergedLinear
from opsin.layers.norm import RMSNorm
from opsin.models.quantization import STORED_DTYPE, quantized_linears

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "model.safetensors.index.json"
_LFS = b"version https://git-lfs.github.com/spec/"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_NAMES = 12
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class WeightTable:
    """How a family's checkpoints name things.

    Attributes:
        renames: (regular expression, replacement), each applied once, in order, to a checkpoint's names.
        unused: regular expressions over the renamed names, of tensors that a checkpoint may carry for nothing.
    """

    renames: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]

    @classmethod
    def of(cls, renames: tuple[tuple[str, str], ...], unused: Mapping[str, Sequence[str]]) -> WeightTable:
        """A table whose ``unused`` says for each submodule what of its own names it leaves out."""
        return cls(renames, tuple(rf"{path}\.{pattern}" for path, patterns in unused.items() for pattern in patterns))

    def without(self, unused: Sequence[str]) -> WeightTable:
        """The same, with more patterns of tensors that count for nothing."""
        return WeightTable(self.renames, (*self.unused, *unused))

    def rename(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name, count=1)
        return name

    def is_unused(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


@dataclass(slots=True)
class _Slot:
    """A place for one checkpoint tensor: a parameter, or a part of one.

    Attributes:
        parts: the names of the smallest pieces that it covers.
        scale: of a quantised weight, the place of its rows' scales.
        pieces: where the tensor's rows go if there is something between them, one piece after the other.
    """

    target: torch.Tensor
    shape: tuple[int, ...]
    parts: frozenset[str]
    scale: _Slot | None = None
    pieces: tuple[_Slot, ...] = ()

    def covers(self, dtype: str) -> frozenset[str]:
        """The parts that a tensor of this dtype fills: a weight that is quantised here brings its scales along."""
        return self.parts | self.scale.parts if self.scale is not None and dtype in _FLOATS else self.parts


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Every name that a (renamed) checkpoint tensor may have."""
    slots: dict[str, _Slot] = {}
    for path, module in model.named_modules():
        if isinstance(module, LMHead) and module.is_tied:
            continue
        parent = path.rpartition(".")[0]
        for kind, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{kind}" if path else kind
            shape = tuple(parameter.shape)
            if isinstance(module, Linear) and kind == "weight" and module.checkpoint_shape is not None:
                shape = module.checkpoint_shape
            if isinstance(module, MergedLinear):
                slots |= _merged_slots(module, parameter.data, name, f"{parent}.{{}}.{kind}")
                continue
            target = parameter.data
            if isinstance(module, Linear) and kind == "weight" and module.num_spare_inputs:
                target = target.zero_()[:, : -module.num_spare_inputs]
                shape = tuple(target.shape)
            slots[name] = _Slot(target, shape, frozenset({name}))
    for name, slot in slots.items():
        if slot.target.dtype in (FP8, INT8):
            slot.scale = slots[f"{name}_scale"]
    return slots


def _merged_slots(module: MergedLinear, parameter: torch.Tensor, name: str, piece_name: str) -> dict[str, _Slot]:
    """One for each of its pieces, and one for all of them under the layer's own name."""
    if module.num_spare:
        parameter.zero_()
    pieces: dict[str, _Slot] = {}
    begin = 0
    for piece, size in module.pieces.items():
        part, target = piece_name.format(piece), parameter[begin : begin + size]
        pieces[part] = _Slot(target, tuple(target.shape), frozenset({part}))
        begin += size + module.num_spare
    shape = (sum(module.pieces.values()), *parameter.shape[1:])
    apart = tuple(pieces.values()) if module.num_spare else ()
    return {**pieces, name: _Slot(parameter, shape, frozenset(pieces), pieces=apart)}


def load_weights(model: nn.Module, folder: Path, table: WeightTable, *, progress: bool = True) -> None:
    """Fill every parameter of ``model`` from the safetensors in ``folder``.

    Args:
        progress: show a bar when there is more than one file.

    Raises:
        WeightError: a file is absent or unreadable, or tensors are missing, unused, repeated, misshapen or quantised;
            the message names them.
    """
    slots = _slots(model)
    missing = {part for slot in slots.values() for part in slot.parts}
    unused: list[str] = []
    files = weight_files(folder)
    for path in tqdm(files, desc="Loading weights", unit="file", disable=not progress or len(files) == 1):
        for name, stored in _open(path, _device_of(model)):
            target_name = table.rename(name)
            slot = slots.get(target_name)
            if slot is None:
                if not table.is_unused(target_name):
                    unused.append(name)
                continue
            parts = slot.covers(stored.get_dtype())
            if not parts <= missing:
                raise WeightError(f"{path.name} repeats {name!r}, which was already loaded. Remove one of the two.")
            _copy(slot, stored, name, path)
            missing -= parts
    if missing or unused:
        raise WeightError(_mismatch(missing, unused, folder))


def stored_dtypes(folder: Path, table: WeightTable) -> dict[str, str]:
    """safetensors' names of the dtypes of a checkpoint's tensors, by the tensors' renamed names.

    Raises:
        WeightError: a file is absent or unreadable.
    """
    cpu = torch.device("cpu")
    return {
        table.rename(name): stored.get_dtype() for path in weight_files(folder) for name, stored in _open(path, cpu)
    }


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, in order.

    Raises:
        WeightError: there are none, or some that the index names are absent, or there are only pickles.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightError(f"{index} is not a weight index: {error!r}. Download it again.") from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise WeightError(
                f"{_INDEX} names {len(names)} files; {len(absent)} of them are not in {folder}: {_some(absent)}. "
                "Download them."
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise WeightError(f"{folder} holds {_some([p.name for p in found])}, but no {_INDEX} says how they belong.")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise WeightError(
            f"{folder} holds pickled weights only ({_some(pickles)}); opening a pickle can run any code, so opsin "
            "does not. Convert them: AutoModelForImageTextToText.from_pretrained(...).save_pretrained(...) writes "
            "safetensors."
        )
    raise WeightError(f"{folder} holds no weights: expected model.safetensors or {_INDEX}.")


def _open(path: Path, device: torch.device) -> Iterator[tuple[str, Any]]:
    """(name, unread slice) of every tensor in a file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():
                yield name, file.get_slice(name)
    except (SafetensorError, OSError) as error:
        if _is_pointer(path):
            raise WeightError(f"{path} is a pointer of Git LFS, not the weights: run 'git lfs pull' there.") from None
        raise WeightError(f"{path} cannot be read as safetensors: {error}. Download it again.") from error


def _is_pointer(path: Path) -> bool:
    """Whether a clone without Git LFS left the address of a file in its place."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS)) == _LFS
    except OSError:
        return False


def _copy(slot: _Slot, stored: Any, name: str, path: Path) -> None:
    dtype, shape = stored.get_dtype(), tuple(stored.get_shape())
    if dtype not in _FLOATS and not (slot.target.dtype == FP8 and dtype == STORED_DTYPE):
        raise WeightError(
            f"{name!r} in {path.name} has dtype {dtype}; expected one of {', '.join(sorted(_FLOATS))}. "
            "Of quantised checkpoints, FP8 ones are supported if config.json says how they were made."
        )
    is_scale = name.endswith("weight_scale")
    if shape != slot.shape and not (is_scale and shape in ((), (1,), (*slot.shape, 1))):
        raise WeightError(
            f"{name!r} in {path.name} has shape {shape}; the config asks for {slot.shape}. "
            "config.json and weights do not belong together."
        )
    value = stored[:] if shape else stored[...]
    if is_scale:  # of a whole tensor, or of each row
        value = value.flatten().expand(slot.shape)
    pieces = slot.pieces or (slot,)
    for piece, rows in zip(pieces, value.split([piece.shape[0] for piece in pieces]), strict=True):
        if piece.scale is not None and dtype in _FLOATS:
            _quantize(rows, piece.target, piece.scale.target)
        else:
            piece.target.copy_(rows.view(piece.target.shape))


def _quantize(value_OI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor) -> None:
    """In pieces, since float32 takes four times the room of what is made of it."""
    for value, weight, scale in zip(*(x.split(_ROWS_AT_ONCE) for x in (value_OI, weight_OI, scale_O)), strict=True):
        rows = quantize_weight(value.to(weight.device), weight.dtype)
        weight.copy_(rows.values_TI)
        scale.copy_(rows.scale_T1.squeeze(1))


def _mismatch(missing: Iterable[str], unused: Sequence[str], folder: Path) -> str:
    lines = [f"The weights in {folder} do not match the model."]
    for what, names in (("missing", sorted(missing)), ("unused", sorted(unused))):
        if names:
            lines.append(f"{len(names)} {what}: {_some(names)}.")
    lines.append("config.json and weights must come from the same checkpoint.")
    return " ".join(lines)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"


def fill_randomly(model: nn.Module, seed: int) -> None:
    """Deterministic random weights, made on the device: norms 1, biases 0, matrices of a scale that keeps activations.

    A parameter's values depend on the seed, its name, its shape and the model's dtype alone; a quantised weight's are
    what it would have held, quantised.
    """
    dtypes = {f"{path}.weight": module.place.dtype for path, module in quantized_linears(model)}
    for name, parameter in model.named_parameters():
        if name.endswith("weight_scale"):
            continue
        if parameter.dim() > 1 or not name.endswith(("weight", "bias")):
            generator = torch.Generator(parameter.device).manual_seed(seed ^ zlib.crc32(name.encode()))
            bound = (3.0 / parameter.shape[-1]) ** 0.5
            values = torch.empty_like(parameter, dtype=dtypes[name]) if name in dtypes else parameter.data
            values.uniform_(-bound, bound, generator=generator)
            if name in dtypes:
                _quantize(values, parameter.data, model.get_parameter(f"{name}_scale").data)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)


def pack(model: nn.Module) -> None:
    """Bring every loaded weight into its kernels' own form, one at a time."""
    for module in model.modules():
        if isinstance(module, Linear | RMSNorm):
            module.pack()
