"""LLaVA-NeXT (HF ``LlavaNextForConditionalGeneration``): LLaVA over many tiles of a picture, put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from opsin.errors import UnsupportedModelError
from opsin.layers import Placement
from opsin.layers.staging import upload
from opsin.models.llava.model import LlavaModel
from opsin.models.picture_model import RENAMES
from opsin.models.rule import PixelNorm
from opsin.types import MediaLayout


class LlavaNextModel(LlavaModel):
    """A picture is an overview and a mosaic of tiles, as ``LlavaNextRule`` says."""

    architecture: ClassVar[str] = "LlavaNextForConditionalGeneration"
    renames = (*RENAMES, (r"^model\.image_newline$", "image_newline"))

    image_newline: nn.Parameter

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        if config.get("use_image_newline_parameter", True) is False:
            raise UnsupportedModelError(
                "use_image_newline_parameter is false; only mosaics with newlines are implemented, as in Hugging Face."
            )
        own = ("image_grid_pinpoints", "use_image_newline_parameter")  # the former is the rule's
        shared = {key: value for key, value in config.items() if key not in own}
        model = super().from_hf(shared, place=place, norm=norm, max_model_len=max_model_len)
        model.image_newline = place.parameter(model.spec.hidden_size)
        return model

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """(sum of num_features, D), the tiles of all pictures in as few passes as can be."""
        return self.arrange(self.encode_tiles(tiles), layouts)

    def arrange(self, features_BPD: torch.Tensor, layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """Features of tiles to those of pictures: overview, mosaic, newlines."""
        rows_MD = torch.cat([features_BPD.flatten(0, 1), self.image_newline.unsqueeze(0)])
        tower = self.tower.config
        (order_M,) = upload([feature_order(layouts, tower.image_size // tower.patch_size)], rows_MD.device)
        return rows_MD.index_select(0, order_M)


def feature_order(layouts: Sequence[MediaLayout], grid: int) -> npt.NDArray[np.int64]:
    """Where each feature of each picture comes from: a row of the tiles' ``grid`` x ``grid`` patches, all tiles one
    after the other, or the newline behind them all."""
    area = grid * grid
    newline = area * sum(1 + layout.numbers[0] * layout.numbers[1] for layout in layouts)
    parts: list[npt.NDArray[np.int64]] = []
    start = 0
    for layout in layouts:
        rows, cols, cut_rows, cut_cols = layout.numbers
        parts.append(np.arange(start, start + area))
        start += area
        tiles = np.arange(start, start + rows * cols * area).reshape(rows, cols, grid, grid)
        start += tiles.size
        mosaic = tiles.transpose(0, 2, 1, 3).reshape(rows * grid, cols * grid)
        kept = mosaic[cut_rows : rows * grid - cut_rows, cut_cols : cols * grid - cut_cols]
        parts.append(np.pad(kept, ((0, 0), (0, 1)), constant_values=newline).ravel())
    return np.concatenate(parts)
