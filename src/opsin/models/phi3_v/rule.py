"""Phi-3-vision's pictures: tiles of the whole at the largest size that ``num_crops`` allows, and an overview of them.

Source: ``Phi3VImageProcessor`` and ``Phi3VProcessor``, the code published with the checkpoints; arXiv:2404.06512.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from opsin.errors import RequestError, UnsupportedModelError
from opsin.media.ops import output_size
from opsin.models.picture_rule import PictureRule, images_only
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    check_built,
    checkpoint_settings,
    read_count,
    read_norm,
    read_settings,
    request_settings,
    with_options,
)
from opsin.models.placeholders import token_ids
from opsin.models.rule import Placeholder, TokenIds
from opsin.models.square_tower import CLIP_LARGE_336
from opsin.models.tiles import Tile
from opsin.types import MediaLayout, Modality, Pad, PixelPlan, Resize, View

_MARK = Placeholder("<|image_{index}|>", None, r"<\|image_([0-9]{1,9})\|>", begins_text=True)
_IMAGE_TOKEN = "<|image|>"
_CLIP_NAME = "openai/clip-vit-large-patch14-336"
_MOST_CROPS = 64
_WHITE = (255, 255, 255)
_PROCESSORS: dict[str, dict[str, Any]] = {
    "Phi3VImageProcessor": {
        "num_crops": 1,
        "num_img_tokens": 144,
        "do_convert_rgb": True,
        "image_mean": CLIP_PIXELS["image_mean"],
        "image_std": CLIP_PIXELS["image_std"],
    }
}


def tower_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The vision tower's settings: those under ``vision_config``, or, as in the published checkpoints, none but a name.

    Raises:
        UnsupportedModelError: no settings, and a name that says nothing here.
    """
    name = (config.get("img_processor") or {}).get("model_name")
    given = config.get("vision_config")
    if given is None and name != _CLIP_NAME:
        raise UnsupportedModelError(
            f"config.json's img_processor.model_name is {name!r}; without a vision_config only {_CLIP_NAME!r} is known."
        )
    return {**CLIP_LARGE_336, **(given or {})}


def read_tile(tower: Mapping[str, Any]) -> Tile:
    """One tile on its way through the tower of a ``tower_config``."""
    return Tile(tower["image_size"], tower["patch_size"], merge=2)


@dataclass(frozen=True, kw_only=True)
class Phi3VRule(PictureRule):
    """The ``MediaRule`` of ``Phi3VForCausalLM``.

    A layout's ``numbers`` are the (rows, columns) of its tiles. The features are the mosaic's row by row, a separator
    after each row, another one, and the overview's in the same way.
    """

    tile: Tile

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        tile = read_tile(tower_config(config))
        name, settings = read_settings(processor, _PROCESSORS, default="Phi3VImageProcessor", family="Phi-3-vision")
        with checkpoint_settings(name):
            check_built(settings, num_img_tokens=tile.num_features)
            read_count(settings, "num_crops", _MOST_CROPS)
            norm = read_norm({**CLIP_PIXELS, **settings})
        (token_id,) = token_ids(tokenizer, _IMAGE_TOKEN)
        return cls(mark=_MARK, image_token_id=token_id, norm=norm, settings=settings, tile=tile)

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=frozenset({"num_img_tokens"}))
        with request_settings():
            num_crops = read_count(settings, "num_crops", _MOST_CROPS)
        edge = self.tile.edge
        # Reckoned on the picture lying down, as the reference does, which lays tall ones on their side.
        long, short = fitted(max(width, height), min(width, height), edge, num_crops)
        gap = -short % edge
        before, behind = gap // 2, gap - gap // 2
        if width < height:
            # Pillow resizes the width first, and rounds; a picture on its side has its height in that place.
            resizes = (Resize(width, long, "bilinear"), Resize(short, long, "bilinear"))
            pad = Pad(before, 0, behind, 0, _WHITE)
        else:
            resizes = (Resize(long, short, "bilinear"),)
            pad = Pad(0, before, 0, behind, _WHITE)
        cols, rows = (length // edge for length in output_size((*resizes, pad), width, height))
        mosaic = View((*resizes, pad), edge, edge, rows, cols)
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=(mosaic,)),
            num_features=self._count(rows, cols),
            num_patches=(rows * cols + 1) * self.tile.num_patches,
            numbers=(rows, cols),
        )

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Features as the model makes them, separators included; how many there may be is checked."""
        layout = super().embedding_layout(modality, num_features, extras)
        grid = self.tile.grid
        mosaic = num_features - self._count(0, 0)
        shapes = ((rows, mosaic - rows * grid) for rows in range(1, _MOST_CROPS + 1))
        if not any(tiles > 0 and tiles % (rows * grid**2) == 0 for rows, tiles in shapes):
            raise RequestError(
                f"An image embedding has {num_features} rows; no picture has as many in this model. The smallest has "
                f"{self._count(1, 1)}, separators included.",
                param="multi_modal_data",
            )
        return layout

    def _count(self, rows: int, cols: int) -> int:
        """Features of the mosaic with its separators, one between, and those of the overview."""
        grid = self.tile.grid
        return rows * grid * (cols * grid + 1) + 1 + grid * (grid + 1)


def fitted(width: int, height: int, edge: int, num_crops: int) -> tuple[int, int]:
    """(width, height) of a lying picture when it is as many tiles wide as leaves it within ``num_crops`` tiles."""
    ratio = width / height
    cols = 1
    while (cols + 1) * math.ceil((cols + 1) / ratio) <= num_crops:
        cols += 1
    return cols * edge, int(cols * edge / ratio)
