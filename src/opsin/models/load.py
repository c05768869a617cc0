"""From a model folder to a model on its device, ready to run."""

from __future__ import annotations

from typing import Literal

import torch

from opsin.kernels import select
from opsin.layers import Placement
from opsin.models import resolve
from opsin.models.hub import ModelFiles
from opsin.models.interface import VisionLanguageModel
from opsin.models.rule import PixelNorm
from opsin.models.weights import fill_randomly, load_weights, pack


def load_model(
    files: ModelFiles,
    norm: PixelNorm,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int | None = None,
    load_format: Literal["auto", "safetensors", "dummy"] = "auto",
    kernels: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> VisionLanguageModel:
    """Build a model, fill its weights and pack them for its kernels.

    Args:
        norm: what the family's rule read from the processor config.
        max_model_len: the longest sequence that will be run; the model's own limit by default.
        load_format: 'dummy' fills the weights at random from ``seed``.

    Raises:
        UnsupportedModelError: the architecture, or a setting of it.
        WeightError: the checkpoint does not match.
    """
    family = resolve(files.config)
    place = Placement(select(device, kernels), device, dtype)
    model = family.load_model().from_hf(files.config, place=place, norm=norm, max_model_len=max_model_len)
    if load_format == "dummy":
        fill_randomly(model, seed)
    else:
        load_weights(model, files.folder, model.weight_table(), progress=progress)
    pack(model)
    return model
