"""Which linear layers are stored in 8 bits: what a user or a checkpoint's config.json says, and what fits.

Two roads lead there. A half-precision checkpoint is quantised as it is loaded, tensor by tensor, to FP8 or INT8; one
that was quantised by others, which is FP8 alone, brings its own weights and scales. Of the latter, the tensors' dtypes
say which layers those are, so lists of exceptions in config.json need no reading.

Activations are always scaled row by row as they come. Scales that a checkpoint measured for them beforehand would save
the search for a row's largest value, and are never nearer to it; they are left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from opsin.errors import ConfigError, UnsupportedModelError, WeightError
from opsin.kernels.quantized import FP8, INT8
from opsin.layers.linear import Linear, MergedLinear
from opsin.models.strict import StrictConfig

logger = logging.getLogger(__name__)

KEY = "quantization_config"
STORED_DTYPE = "F8_E4M3"  # safetensors' name
KINDS = {"fp8": FP8, "int8": INT8}  # as users ask for them
UNUSED = (r".*\.(input|output|k|v|q)_scale",)
"""Names of the tensors, beside ``weight_scale``, that quantised checkpoints carry."""
_INSTEAD = (
    "Use the half-precision checkpoint it was made from with quantization='fp8', or a compressed-tensors FP8 one."
)


def is_stored_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json speaks of a checkpoint whose weights are e4m3 with scales for channels or tensors.

    Raises:
        UnsupportedModelError: it is quantised in another way.
    """
    values = config.get(KEY)
    if values is None:
        return False
    if not isinstance(values, Mapping):
        raise UnsupportedModelError(f"{KEY} is a {type(values).__name__}; expected an object.")
    method = values.get("quant_method")
    settings = StrictConfig(values, KEY)
    settings.skip("quant_method", "kv_cache_scheme")
    if method == "compressed-tensors":
        _read_compressed_tensors(settings)
    elif method == "fp8":
        block = settings.take("weight_block_size")
        if block is not None:
            raise UnsupportedModelError(
                f"{KEY}.weight_block_size is {block}: weights with a scale for each block are not implemented, only "
                f"scales for channels and tensors. {_INSTEAD}"
            )
        settings.choose("activation_scheme", ("dynamic", "static"), "dynamic")
        settings.choose("fmt", ("e4m3",), "e4m3")
        settings.skip("ignored_layers", "modules_to_not_convert")
    else:
        raise UnsupportedModelError(
            f"{KEY}.quant_method is {method!r}; implemented are 'compressed-tensors' with 8-bit floats and 'fp8'. "
            f"{_INSTEAD}"
        )
    settings.finish()
    return True


def _read_compressed_tensors(settings: StrictConfig) -> None:
    form = settings.take("format")
    if form != "float-quantized":
        raise UnsupportedModelError(
            f"{KEY}.format is {form!r}; of compressed-tensors, 'float-quantized' alone is implemented. {_INSTEAD}"
        )
    settings.choose("quantization_status", ("compressed", "frozen"), "compressed")
    settings.choose("sparsity_config", ({}, {"format": "dense"}), {})
    settings.choose("transform_config", ({},), {})
    settings.skip("global_compression_ratio", "ignore", "version")
    for name, group in settings.require("config_groups").items():
        where = f"{KEY}.config_groups.{name}"
        parts = StrictConfig(group, where)
        parts.skip("targets")
        parts.choose("format", (None, "float-quantized"), None)
        parts.choose("output_activations", (None,), None)
        _read_floats(parts.require("weights"), f"{where}.weights", (("channel", False), ("tensor", False)))
        rows = parts.require("input_activations")
        _read_floats(rows, f"{where}.input_activations", (("token", True), ("tensor", False), ("tensor", True)))
        parts.finish()


def _read_floats(values: Mapping[str, Any], where: str, allowed: tuple[tuple[str, bool], ...]) -> None:
    """Check one description of how values are stored: ``allowed`` are pairs of strategy and of being found as they
    come."""
    settings = StrictConfig(values, where)
    settings.choose("type", ("float",), "int")
    settings.choose("num_bits", (8,), 8)
    settings.choose("symmetric", (True,), True)
    pair = (settings.take("strategy"), bool(settings.take("dynamic", False)))
    if pair not in allowed:
        known = " or ".join(f"{'dynamic' if dynamic else 'static'} by {strategy}" for strategy, dynamic in allowed)
        raise UnsupportedModelError(
            f"{where} is {'dynamic' if pair[1] else 'static'} by {pair[0]}; implemented is {known}. {_INSTEAD}"
        )
    settings.choose("scale_dtype", (None, "float32", "torch.float32", "bfloat16", "torch.bfloat16"), None)
    settings.skip("actorder", "block_structure", "group_size", "observer", "observer_kwargs", "zp_dtype")
    settings.finish()


def check_device(device: torch.device, kind: torch.dtype) -> None:
    """
    Raises:
        ConfigError: a GPU without 8-bit tensor cores, or one asked for integers.
    """
    if device.type == "cuda" and kind == INT8:
        raise ConfigError(
            "quantization is 'int8', whose kernels are a CPU's; the device is a GPU. Use 'fp8' there, or leave it out."
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"FP8 needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell); this one, "
            f"{torch.cuda.get_device_name(device)}, has not. Leave quantization and kv_cache_dtype out."
        )


def allocate(model: nn.Module, kind: torch.dtype, stored: Mapping[str, str] | None = None) -> None:
    """Give every deferred linear layer its memory: of ``kind`` where it is to be quantised.

    Args:
        stored: dtypes of the checkpoint's tensors by their renamed names, where it is the checkpoint that decides; by
            default every layer that may be quantised is.

    Raises:
        WeightError: the checkpoint holds a layer as e4m3 that is not multiplied so, or only some pieces of one.
    """
    left: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, Linear) or not module.weight.is_meta:
            continue
        quantized = module.is_quantizable if stored is None else _is_stored_quantized(path, module, stored)
        module.allocate(kind if quantized else None)
        if not quantized:
            left.add(re.sub(r"\d+", "*", path))
    name = next(name for name, known in KINDS.items() if known == kind).upper()
    logger.info("%s linear layers; in half precision remain %s", name, ", ".join(sorted(left)) or "none")


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The layers whose weights are quantised, by path."""
    for path, module in model.named_modules():
        if isinstance(module, Linear) and module.weight_scale is not None:
            yield path, module


def _is_stored_quantized(path: str, module: Linear, stored: Mapping[str, str]) -> bool:
    parent = path.rpartition(".")[0]
    pieces = module.pieces if isinstance(module, MergedLinear) else ()
    names = [f"{path}.weight", *(f"{parent}.{piece}.weight" for piece in pieces)]
    found = {name: stored[name] == STORED_DTYPE for name in names if name in stored}
    if len(set(found.values())) > 1:
        raise WeightError(f"Of {', '.join(found)}, which are multiplied together, some are FP8 and others are not.")
    quantized = any(found.values())
    if quantized and not module.is_quantizable:
        raise WeightError(
            f"{next(iter(found))} is FP8 of shape {tuple(module.weight.shape)}; opsin multiplies this layer in half "
            "precision (8-bit products need sizes in multiples of 16). Use a checkpoint that leaves it so."
        )
    return quantized
