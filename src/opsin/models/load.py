"""From a model folder to a model on its device, ready to run."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from opsin.errors import ConfigError
from opsin.kernels import select
from opsin.kernels.quantized import FP8
from opsin.layers import Placement
from opsin.models import resolve
from opsin.models.hub import ModelFiles
from opsin.models.interface import VisionLanguageModel
from opsin.models.quantization import KEY, KINDS, UNUSED, allocate, check_device, is_stored_quantized
from opsin.models.rule import PixelNorm
from opsin.models.weights import WeightTable, fill_randomly, load_weights, pack, stored_dtypes


def load_model(
    files: ModelFiles,
    norm: PixelNorm,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int | None = None,
    load_format: Literal["auto", "safetensors", "dummy"] = "auto",
    quantization: Literal["fp8", "int8"] | None = None,
    kernels: str = "auto",
    seed: int = 0,
    progress: bool = True,
    has_decoder: bool = True,
) -> VisionLanguageModel:
    """Build a model, fill its weights and pack them for its kernels.

    Args:
        norm: what the family's rule read from the processor config.
        max_model_len: the longest sequence that will be run; the model's own limit by default.
        load_format: 'dummy' fills the weights at random from ``seed``.
        quantization: 'fp8' or 'int8' quantises a half-precision checkpoint's linear layers; one that is FP8 stays so.
        has_decoder: False for a model that only encodes, as ``without_tower`` makes one that does not.

    Raises:
        UnsupportedModelError: the architecture, or a setting of it.
        WeightError: the checkpoint does not match.
        ConfigError: the device cannot multiply what is asked for, or the checkpoint is quantised otherwise.
    """
    family = resolve(files.config)
    is_stored = is_stored_quantized(files.config)
    if is_stored and quantization == "int8":
        raise ConfigError("quantization is 'int8'; the checkpoint is FP8 already. Leave quantization out.")
    kind = FP8 if is_stored else None if quantization is None else KINDS[quantization]
    if kind is not None:
        check_device(device, kind)
    config = {name: value for name, value in files.config.items() if name != KEY}
    place = Placement(select(device, kernels), device, dtype, defers_linears=kind is not None)
    model = family.load_model().from_hf(config, place=place, norm=norm, max_model_len=max_model_len)
    table: WeightTable = model.weight_table()
    if not has_decoder:
        del model.decoder  # its memory has not been written, so it was never resident
        table = table.without((r"decoder\..*",))
    from_files = load_format != "dummy"
    if is_stored:
        table = table.without(UNUSED)
    if kind is not None:
        allocate(model, kind, stored_dtypes(files.folder, table) if is_stored and from_files else None)
    if from_files:
        load_weights(model, files.folder, table, progress=progress)
    else:
        fill_randomly(model, seed)
    pack(model)
    return model


def without_tower(model: VisionLanguageModel) -> None:
    """Free what only ``encode`` needs, which the model then does no more."""
    assert isinstance(model, nn.Module)
    for parts in (model._modules, model._parameters, model._buffers):
        for name in [name for name in parts if name != "decoder"]:
            del parts[name]
