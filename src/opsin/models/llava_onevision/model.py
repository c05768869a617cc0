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
        """(sum of num_features, D), the tiles of all pictures and videos in as few passes as can be."""
        features_BPD = self.encode_tiles(tiles)
        if all(layout.numbers for layout in layouts):
            return self.arrange(features_BPD, layouts)
        items = zip(features_BPD.split([len(item) for item in tiles]), layouts, strict=True)
        return torch.cat([self.arrange(x, [layout]) if layout.numbers else self._video(x) for x, layout in items])

    def _video(self, frames_FPD: torch.Tensor) -> torch.Tensor:
        """Each frame at half its rows and columns, one newline behind all."""
        grid = self.tower.config.image_size // self.tower.config.patch_size
        half = (grid + 1) // 2
        frames_FRCD = _resampled(frames_FPD.unflatten(1, (grid, grid)), (half, half))
        return torch.cat([frames_FRCD.flatten(0, 2), self.image_newline.unsqueeze(0)])

    def arrange(self, features_BPD: torch.Tensor, layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """As LLaVA-NeXT's; mosaics that are too large come out smaller."""
        whole_MD = super().arrange(features_BPD, layouts)
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
                mosaic_1RCD = mosaic_MD.unflatten(0, (1, rows, cols + 1))[:, :, :-1]
                mosaic_RCD = _resampled(mosaic_1RCD, size).squeeze(0)
                newlines_R1D = self.image_newline.expand(size[0], 1, -1)
                part_MD = torch.cat([overview_PD, torch.cat([mosaic_RCD, newlines_R1D], dim=1).flatten(0, 1)])
            parts.append(part_MD)
        return torch.cat(parts)


def _kept(layout: MediaLayout, grid: int) -> tuple[int, int]:
    """Rows and columns of a mosaic's patches that do not only see padding."""
    rows, cols, cut_rows, cut_cols = layout.numbers
    return rows * grid - 2 * cut_rows, cols * grid - 2 * cut_cols


def _resampled(x_BRCD: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mosaics or frames at another number of rows and columns; bilinear, not antialiased, as it was trained."""
    return F.interpolate(x_BRCD.permute(0, 3, 1, 2), size=size, mode="bilinear").permute(0, 2, 3, 1)
