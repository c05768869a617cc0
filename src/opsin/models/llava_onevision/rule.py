"""LLaVA-OneVision's pictures: LLaVA-NeXT's over more resolutions, with a limit on the features of one.

Source: Hugging Face ``LlavaOnevisionImageProcessor`` (Pillow-backed), ``LlavaOnevisionProcessor`` and
``LlavaOnevisionModel.pack_image_features``; arXiv:2408.03326.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from opsin.errors import MediaError, UnsupportedModelError
from opsin.models.llava_next.rule import LlavaNextRule
from opsin.models.pictures import CLIP_PIXELS
from opsin.models.rule import TokenIds

CONFIG_DEFAULTS: Mapping[str, Any] = {  # LlavaOnevisionConfig's
    "image_grid_pinpoints": [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)],
    "image_token_index": 151646,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 384,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
_TOLERANCE = 1.1


@dataclass(frozen=True, kw_only=True)
class LlavaOnevisionRule(LlavaNextRule):
    """The ``MediaRule`` of ``LlavaOnevisionForConditionalGeneration``.

    Every picture is tiled, as Hugging Face and vLLM do with a prompt's list of pictures.

    Attributes:
        max_tiles: a mosaic that would have clearly more features than so many tiles is shrunk to about as many.
    """

    family: ClassVar[str] = "LLaVA-OneVision"
    processors: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "LlavaOnevisionImageProcessor": {
            **CLIP_PIXELS,
            "size": {"height": 384, "width": 384},
            "do_center_crop": None,
            "crop_size": None,
            "do_pad": True,
            "image_grid_pinpoints": CONFIG_DEFAULTS["image_grid_pinpoints"],
            "num_image_tokens": None,
            "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_9",
        }
    }
    config_defaults: ClassVar[Mapping[str, Any]] = CONFIG_DEFAULTS
    fixed: ClassVar[frozenset[str]] = frozenset(
        {"image_grid_pinpoints", "num_image_tokens", "video_token", "vision_aspect_ratio"}
    )

    max_tiles: int = 9

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        rule = super().from_hf(config, processor, tokenizer)
        max_tiles, given = read_max_tiles(config), read_max_tiles(rule.settings)
        if given != max_tiles:
            raise UnsupportedModelError(
                f"The processor's vision_aspect_ratio allows {given} tiles, but config.json's allows {max_tiles}."
            )
        num_patches, count = (rule.image_size // rule.patch_size) ** 2, rule.settings["num_image_tokens"]
        if count not in (None, num_patches):
            raise UnsupportedModelError(
                f"The processor's num_image_tokens is {count}; the tower makes {num_patches} features of a tile."
            )
        return replace(rule, max_tiles=max_tiles)

    def shown(self, rows: int, cols: int) -> tuple[int, int]:
        made = shrunk(rows, cols, self.image_size // self.patch_size, self.max_tiles)
        if 0 in made and rows * cols:
            raise MediaError(
                f"Of this picture's {rows} rows and {cols} columns of patches, {made[0]} and {made[1]} would be left: "
                "it is too narrow for this model. Crop it, or pad it to a squarer shape.",
                code="image_too_small",
            )
        return made


def read_max_tiles(settings: Mapping[str, Any]) -> int:
    """The number in a ``vision_aspect_ratio``.

    Raises:
        UnsupportedModelError: it is not 'anyres_max_N'.
    """
    given = settings.get("vision_aspect_ratio") or CONFIG_DEFAULTS["vision_aspect_ratio"]
    match = re.fullmatch(r"anyres_max_([1-9]\d*)", str(given))
    if match is None:
        raise UnsupportedModelError(f"vision_aspect_ratio is {given!r}; only 'anyres_max_N' is implemented.")
    return int(match[1])


def shrunk(rows: int, cols: int, grid: int, max_tiles: int) -> tuple[int, int]:
    """(rows, columns) of a mosaic of so many patches after it was shrunk to ``max_tiles`` tiles of ``grid`` squared;
    as it was, where it is hardly larger."""
    ratio = math.sqrt(rows * cols / (max_tiles * grid**2))
    return (int(rows // ratio), int(cols // ratio)) if ratio > _TOLERANCE else (rows, cols)
