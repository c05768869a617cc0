"""Gemma 3's pictures: one square view each, and with pan and scan crops along the longer side besides.

Source: Hugging Face ``Gemma3Processor`` and ``Gemma3ImageProcessor``; arXiv:2503.19786.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from opsin.errors import MediaError, RequestError
from opsin.models.picture_rule import PictureRule, given_features, images_only
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    SIGLIP_NORM,
    checkpoint_settings,
    read_count,
    read_norm,
    read_settings,
    request_settings,
    square_view,
    with_options,
)
from opsin.models.placeholders import agreed_id, plain_mark, token_ids
from opsin.models.rule import TokenIds, TokenRun
from opsin.models.square_tower import SquareTower, read_square_tower
from opsin.types import Crop, MediaLayout, Modality, PixelPlan, View

_TOKENS = {  # by the name of their ids in config.json
    "boi_token_index": ("<start_of_image>", 255999),
    "image_token_index": ("<image_soft_token>", 262144),
    "eoi_token_index": ("<end_of_image>", 256000),
}
_MOST_CROPS = 64
_PROCESSORS: dict[str, dict[str, Any]] = {
    "Gemma3ImageProcessor": {
        **CLIP_PIXELS,
        "size": {"height": 224, "width": 224},
        "default_to_square": True,
        "resample": 2,
        **SIGLIP_NORM,
        "do_pan_and_scan": False,
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
}


@dataclass(frozen=True, kw_only=True)
class Gemma3Rule(PictureRule):
    """The ``MediaRule`` of ``Gemma3ForConditionalGeneration``.

    Attributes:
        tile_features: rows that each view of a picture comes to.
        tags: the tokens before and behind them.
    """

    tower: SquareTower
    tile_features: int
    tags: tuple[int, int]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        tower = read_square_tower({**config, "vision_feature_select_strategy": "full"}, family="Gemma 3")
        name, settings = read_settings(processor, _PROCESSORS, default="Gemma3ImageProcessor", family="Gemma 3")
        text, *_ = tokens = [token for token, _ in _TOKENS.values()]
        begin, image_token_id, end = token_ids(tokenizer, *tokens)
        for key, (token, default) in _TOKENS.items():
            agreed_id(tokenizer, token, config, key, default)
        with checkpoint_settings(name):
            rule = cls(
                tower=tower,
                tile_features=config.get("mm_tokens_per_image") or 256,
                tags=(begin, end),
                mark=plain_mark(text, begin),
                image_token_id=image_token_id,
                norm=read_norm(settings),
                settings=settings,
            )
            rule.layout("image", tower.image_size, tower.image_size, 1, {})  # what no picture can satisfy fails now
        return rule

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options)
        edge = self.tower.image_size
        views = [square_view(settings, edge, width, height)]
        if settings["do_pan_and_scan"]:
            with request_settings():
                crops = pan_and_scan(width, height, *_pan_and_scan_settings(settings))
            for crop in crops:
                made = square_view(settings, edge, crop.width, crop.height)
                views.append(View((crop, *made.ops), height=edge, width=edge))
        return MediaLayout(
            PixelPlan(width=width, height=height, views=tuple(views)),
            num_features=len(views) * self.tile_features,
            num_patches=len(views) * self.tower.num_patches,
        )

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        super().embedding_layout(modality, num_features, extras)
        if num_features % self.tile_features:
            raise RequestError(
                f"An image embedding has {num_features} rows; this model takes {self.tile_features} for a picture and "
                "as many for each of its crops.",
                param="multi_modal_data",
            )
        return given_features(num_features)

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        images_only(modality)
        begin, end = self.tags
        tile = [TokenRun(begin), TokenRun(self.image_token_id, self.tile_features, is_feature=True), TokenRun(end)]
        num_crops = layout.num_features // self.tile_features - 1
        if not num_crops:
            return ["\n\n", *tile, "\n\n"]
        crops = [part for _ in range(num_crops - 1) for part in ("\n\n \n\n", *tile)]
        return [
            *("Here is the original image \n\n", *tile),
            *("\n\n and here are some crops to help you see better \n\n", *tile),
            *(*crops, "\n\n"),
        ]

    def bidirectional(self, spans: Sequence[tuple[int, int]], prompt_len: int) -> list[tuple[int, int]]:
        return list(spans)


def pan_and_scan(width: int, height: int, min_size: int, max_crops: int, min_ratio: float) -> list[Crop]:
    """Equal pieces along the longer side, the last one what is left; none where the picture is nearly square or the
    pieces would be smaller than ``min_size``.

    Raises:
        MediaError: the picture has fewer pixels along that side than it would have pieces.
    """
    long, short = max(width, height), min(width, height)
    if long / short < min_ratio:
        return []
    count = min(long // min_size, math.floor(long / short + 0.5))
    count = min(max_crops, max(2, count))
    size = math.ceil(long / count)
    if min(size, short) < min_size:
        return []
    starts = [size * i for i in range(count)]
    if starts[-1] >= long:
        raise MediaError(
            f"A picture of {width} x {height} pixels cannot be cut into {count} crops of {size} pixels. Use a larger "
            "one, a larger pan_and_scan_min_crop_size, or no pan and scan."
        )
    sizes = [min(size, long - start) for start in starts]
    if width >= height:
        return [Crop(start, 0, part, height) for start, part in zip(starts, sizes, strict=True)]
    return [Crop(0, start, width, part) for start, part in zip(starts, sizes, strict=True)]


def _pan_and_scan_settings(settings: Mapping[str, Any]) -> tuple[int, int, float]:
    """The arguments of ``pan_and_scan``; ``ValueError`` says which setting is wrong."""
    size, crops = (
        settings["pan_and_scan_min_crop_size"],
        read_count(settings, "pan_and_scan_max_num_crops", _MOST_CROPS),
    )
    ratio = settings["pan_and_scan_min_ratio_to_activate"]
    if type(size) is not int or size < 1:
        raise ValueError(f"pan_and_scan_min_crop_size is {size!r}; it must be a whole number of pixels, at least 1.")
    if type(ratio) not in (int, float):
        raise ValueError(f"pan_and_scan_min_ratio_to_activate is {ratio!r}; it must be a number.")
    return size, crops, ratio
