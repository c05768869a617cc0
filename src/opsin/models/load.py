"""From a model folder to a model on its device, ready to run."""

from __future__ import annotations

from typing import Literal

import torch

from opsin.kernels import select
from opsin.layers import Placement
from opsin.models import quantization as fp8
from opsin.models import resolve
from opsin.models.hub import ModelFiles
from opsin.models.interface import VisionLanguageModel
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
    quantization: str | None = None,
    kernels: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> VisionLanguageModel:
    """Build a model, fill its weights and pack them for its kernels.

    Args:
        norm: what the family's rule read from the processor config.
        max_model_len: the longest sequence that will be run; the model's own limit by default.
        load_format: 'dummy' fills the weights at random from ``seed``.
        quantization: 'fp8' quantises a half-precision checkpoint's linear layers; one that is quantised stays as it is.

    Raises:
        UnsupportedModelError: the architecture, or a setting of it.
        WeightError: the checkpoint does not match.
        ConfigError: the device cannot multiply what is asked for.
    """
    family = resolve(files.config)
    is_stored_quantized = fp8.is_stored_quantized(files.config)
    is_quantized = is_stored_quantized or quantization is not None
    if is_quantized:
        fp8.check_device(device)
    config = {name: value for name, value in files.config.items() if name != fp8.KEY}
    place = Placement(select(device, kernels), device, dtype, defers_linears=is_quantized)
    model = family.load_model().from_hf(config, place=place, norm=norm, max_model_len=max_model_len)
    table: WeightTable = model.weight_table()
    from_files = load_format != "dummy"
    if is_stored_quantized:
        table = table.without(fp8.UNUSED)
    if is_quantized:
        fp8.allocate(model, stored_dtypes(files.folder, table) if is_stored_quantized and from_files else None)
    if from_files:
        load_weights(model, files.folder, table, progress=progress)
    else:
        fill_randomly(model, seed)
    pack(model)
    return model
