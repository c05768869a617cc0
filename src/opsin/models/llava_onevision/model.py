"""LLaVA-OneVision, arXiv:2408.03326 (HF ``LlavaOnevisionForConditionalGeneration``): LLaVA-NeXT, and large mosaics
resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F

from opsin.layers import Placement
from opsin.models.llava_next.model import LlavaNextModel
from opsin.models.llava_onevision.rule import CONFIG_DEFAULTS, read_max_tiles, shrunk
from opsin.models.rule import PixelNorm
from opsin.types import MediaLayout

_OWN_KEYS = ("vision_aspect_ratio", "video_token_index", "video_token_id")


class LlavaOnevisionModel(LlavaNextModel):
    """A picture is an overview and a mosaic of tiles, as ``LlavaOnevisionRule`` says."""

    architecture: ClassVar[str] = "LlavaOnevisionForConditionalGeneration"
    max_tiles: int

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        given = {key: value for key, value in config.items() if value is not None}
        shared = {key: value for key, value in {**CONFIG_DEFAULTS, **given}.items() if key not in _OWN_KEYS}
        shared["text_config"] = {"model_type": "qwen2", **given.get("text_config", {})}
        model = super().from_hf(shared, place=place, norm=norm, max_model_len=max_model_len)
        model.max_tiles = read_max_tiles(config)
        return model

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """(sum of num_features, D), all tiles of all pictures in one pass."""
        whole_MD = super().encode(tiles, layouts)
        grid = self.tower.config.image_size // self.tower.config.patch_size
        kept = [_kept(layout, grid) for layout in layouts]
        counts = [grid**2 + rows * (cols + 1) for rows, cols in kept]
        if counts == [layout.num_features for layout in layouts]:
            return whole_MD
        parts: list[torch.Tensor] = []
        for part_MD, (rows, cols) in zip(whole_MD.split(counts), kept, strict=True):
            size = shrunk(rows, cols, grid, self.max_tiles)
            if size != (rows, cols):
                overview_PD, mosaic_MD = part_MD.split([grid**2, rows * (cols + 1)])
                mosaic_RCD = _resampled(mosaic_MD.unflatten(0, (rows, cols + 1))[:, :-1], size)
                newlines_R1D = self.image_newline.expand(size[0], 1, -1)
                part_MD = torch.cat([overview_PD, torch.cat([mosaic_RCD, newlines_R1D], dim=1).flatten(0, 1)])
            parts.append(part_MD)
        return torch.cat(parts)


def _kept(layout: MediaLayout, grid: int) -> tuple[int, int]:
    """Rows and columns of a mosaic's patches that do not only see padding."""
    rows, cols, cut_rows, cut_cols = layout.numbers
    return rows * grid - 2 * cut_rows, cols * grid - 2 * cut_cols


def _resampled(mosaic_RCD: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The mosaic at another number of rows and columns; bilinear, not antialiased, as it was trained."""
    mosaic_1DRC = mosaic_RCD.permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(mosaic_1DRC, size=size, mode="bilinear").squeeze(0).permute(1, 2, 0)
