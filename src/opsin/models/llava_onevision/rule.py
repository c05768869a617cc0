"""LLaVA-OneVision's pictures: LLaVA-NeXT's over more resolutions, with a limit on the features of one. Its videos:
square frames.

Source: Hugging Face ``LlavaOnevisionImageProcessor`` (Pillow-backed), ``LlavaOnevisionProcessor`` and
``LlavaOnevisionModel.pack_image_features``; arXiv:2408.03326.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.models.llava_next.rule import LlavaNextRule
from opsin.models.picture_rule import given_features
from opsin.models.picture_settings import CLIP_PIXELS, check_built, checkpoint_settings, square_view, with_options
from opsin.models.placeholders import agreed_id, plain_mark
from opsin.models.rule import TokenIds
from opsin.models.videos import VIDEO_PIXELS, check_video_pixels, read_video_settings, sample, spread
from opsin.types import Clip, MediaLayout, Modality, PixelPlan

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
_VIDEO_PROCESSORS: dict[str, dict[str, Any]] = {
    "LlavaOnevisionVideoProcessor": {
        **VIDEO_PIXELS,
        "default_to_square": False,
        "size": {"height": 384, "width": 384},
        "do_center_crop": None,
        "crop_size": None,
    }
}


@dataclass(frozen=True, kw_only=True)
class LlavaOnevisionRule(LlavaNextRule):
    """The ``MediaRule`` of ``LlavaOnevisionForConditionalGeneration``.

    Every picture is tiled, as Hugging Face and vLLM do with a prompt's list of pictures.

    A video's frames are square, and at half their rows and columns; one newline follows them all.

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
        with checkpoint_settings(next(iter(cls.processors))):
            check_built(rule.settings, num_image_tokens=(rule.image_size // rule.patch_size) ** 2)
        name, video_settings = read_video_settings(
            processor, _VIDEO_PROCESSORS, default="LlavaOnevisionVideoProcessor", family=cls.family
        )
        check_video_pixels(name, video_settings, rule.settings)
        with checkpoint_settings(name):
            if video_settings["do_center_crop"]:
                raise ValueError("do_center_crop is not implemented.")
            square_view(video_settings, rule.image_size, rule.image_size, rule.image_size)
        video_token = rule.settings["video_token"]
        key = "video_token_index" if "video_token_index" in config else "video_token_id"
        video_id = agreed_id(tokenizer, video_token, config, key, 151647)  # LlavaOnevisionConfig's default
        return replace(
            rule,
            max_tiles=max_tiles,
            video_settings=video_settings,
            video_mark=None if video_id is None else plain_mark(video_token, video_id),
        )

    @property
    def num_frame_features(self) -> int:
        """Features of one frame of a video."""
        return ((self.image_size // self.patch_size + 1) // 2) ** 2

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        settings = with_options(self.video_settings, options, others=self.settings)
        clip = sample(clip, settings, options, lambda clip: spread(clip, settings))
        view = square_view(settings, self.image_size, clip.width, clip.height)
        num_patches = (self.image_size // self.patch_size) ** 2
        return MediaLayout(
            plan=PixelPlan(width=clip.width, height=clip.height, views=(view,), frames=clip.frames),
            num_features=len(clip.frames) * self.num_frame_features + 1,
            num_patches=len(clip.frames) * num_patches,
        )

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Of videos: every frame's, and the newline's."""
        self.placeholder(modality)  # refuses videos where there are none
        if modality == "image":
            return super().embedding_layout(modality, num_features, extras)
        frames, newlines = divmod(num_features, self.num_frame_features)
        if extras or frames < 1 or newlines != 1:
            raise RequestError(
                f"A video's embedding has {num_features} rows{' and more beside them' * bool(extras)}; in this model "
                f"it comes alone, with {self.num_frame_features} for each frame and one for the newline behind them.",
                param="multi_modal_data",
            )
        return given_features(num_features)

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
