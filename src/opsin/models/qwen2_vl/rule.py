"""Qwen2-VL's pictures and videos: each at its own resolution, in whole merge units; M-RoPE positions.

Source: Hugging Face ``Qwen2VLImageProcessor``, ``Qwen2VLVideoProcessor`` and ``get_rope_index`` of ``Qwen2VLModel`` and
``Qwen2_5_VLModel``; arXiv:2409.12191. Besides its tower, Qwen2.5-VL differs in that a video's positions count time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import msgspec
import numpy as np

from opsin.models.mrope import counted, given_grid, mrope_positions
from opsin.models.picture_rule import PictureRule, images_only
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    check_built,
    check_pixels,
    checkpoint_settings,
    fitted_view,
    read_resample,
    read_settings,
    with_options,
)
from opsin.models.placeholders import agreed_id, token_ids
from opsin.models.rule import Placeholder, Positions, TokenIds
from opsin.models.smart_resize import own_size, pixel_bounds, requested_bounds, smart_resize
from opsin.models.videos import (
    VIDEO_PIXELS,
    check_video_pixels,
    read_video_settings,
    sample,
    spaced_in_steps,
    whole_steps,
)
from opsin.types import Clip, MediaItem, MediaLayout, Modality, PixelPlan

GEOMETRY = ("patch_size", "merge_size", "temporal_patch_size")
_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2VLImageProcessor": {**CLIP_PIXELS, **own_size(14, 56 * 56, 28 * 28 * 1280)}
}
VIDEO_DEFAULTS: Mapping[str, Any] = {
    **VIDEO_PIXELS,
    **own_size(14, 128 * 28 * 28, 28 * 28 * 768),
    "min_frames": 4,
    "max_frames": 768,
    "cap_pixels_per_frame": False,
    "max_video_tokens": 128000,
}


@dataclass(frozen=True, kw_only=True)
class Qwen2VLRule(PictureRule):
    """The ``MediaRule`` of ``Qwen2VLForConditionalGeneration`` and ``Qwen2_5_VLForConditionalGeneration``.

    A layout's ``numbers`` are the grid (time, rows, columns) in patches; ``merge_size`` squared of them make one
    feature. A video's ``times`` is what one step of its grid takes, in seconds.

    Attributes:
        family: its name, for errors.
        image_processors: those it takes, as ``read_settings`` wants them; the first is the default.
        video_processors: likewise, as ``read_video_settings`` wants them.
        image_sign: what prompts hold for a picture: a token that expands, between two that stay; likewise
            ``video_sign``.
        frames_per_patch: along time; an odd number of frames is made even by repeating the last.
        tokens_per_second: how fast a video's positions count; None counts the grid's steps.
    """

    family: ClassVar[str] = "Qwen2-VL and Qwen2.5-VL"
    image_processors: ClassVar[Mapping[str, Mapping[str, Any]]] = _PROCESSORS
    video_processors: ClassVar[Mapping[str, Mapping[str, Any]]] = {"Qwen2VLVideoProcessor": VIDEO_DEFAULTS}
    image_sign: ClassVar[Sequence[str]] = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    video_sign: ClassVar[Sequence[str]] = ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")
    default_patch_size: ClassVar[int] = 14

    patch_size: int
    merge_size: int
    frames_per_patch: int
    video_settings: Mapping[str, Any]
    tokens_per_second: float | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        kind, video_kind = cls.default_processors(config, processor)
        name, settings = read_settings(processor, cls.image_processors, default=kind, family=cls.family)
        video_name, video_settings = read_video_settings(
            processor, cls.video_processors, default=video_kind, family=cls.family
        )
        vision = config.get("vision_config") or {}
        with checkpoint_settings(name):
            check_built(
                settings,
                patch_size=vision.get("patch_size", cls.default_patch_size),
                merge_size=vision.get("spatial_merge_size", 2),
                temporal_patch_size=vision.get("temporal_patch_size", 2),
            )
        for of, made in ((name, settings), (video_name, video_settings)):
            with checkpoint_settings(of):
                made["size"] = pixel_bounds(made)
            for bound in {"min_pixels", "max_pixels"} & set(made):
                made[bound] = None  # said by size from here on, which options may override
        norm = check_pixels(name, settings, read_resample)
        check_video_pixels(video_name, video_settings, settings, *GEOMETRY)
        (token_id,) = token_ids(tokenizer, cls.image_sign[1])
        agreed_id(tokenizer, cls.image_sign[1], config, "image_token_id")
        video_id = agreed_id(tokenizer, cls.video_sign[1], config, "video_token_id")
        counts_time = config.get("model_type") == "qwen2_5_vl"
        return cls(
            patch_size=settings["patch_size"],
            merge_size=settings["merge_size"],
            frames_per_patch=settings["temporal_patch_size"],
            video_settings=video_settings,
            tokens_per_second=vision.get("tokens_per_second", 4) if counts_time else None,
            mark=_mark(cls.image_sign, token_id),
            video_mark=None if video_id is None else _mark(cls.video_sign, video_id),
            image_token_id=token_id,
            norm=norm,
            settings=settings,
        )

    @classmethod
    def default_processors(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> tuple[str, str]:
        """Those for pictures and for videos of a folder that names none."""
        return next(iter(cls.image_processors)), next(iter(cls.video_processors))

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=frozenset(GEOMETRY), others=self.video_settings)
        bounds = requested_bounds(settings)
        return self.laid_out(settings, width, height, lambda: smart_resize(width, height, self.unit, *bounds))

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        settings = with_options(self.video_settings, options, fixed=frozenset(GEOMETRY), others=self.settings)
        clip = sample(clip, settings, options, lambda clip: spaced_in_steps(clip, settings, self.frames_per_patch))
        least, most = requested_bounds(settings)
        if settings["cap_pixels_per_frame"]:
            total = int(settings["max_video_tokens"] * self.unit * self.unit * 0.9)
            most = max(min(most, total * self.frames_per_patch // len(clip.frames)), int(least * 1.05))
        width, height = clip.width, clip.height
        layout = self.laid_out(
            settings,
            width,
            height,
            lambda: smart_resize(width, height, self.unit, least, most),
            whole_steps(clip.frames, self.frames_per_patch),
        )
        if self.tokens_per_second is None:
            return layout
        return msgspec.structs.replace(layout, times=(self.frames_per_patch / clip.chosen_fps,))

    @property
    def unit(self) -> int:
        """Pixels along a feature's side."""
        return self.patch_size * self.merge_size

    def laid_out(
        self,
        settings: Mapping[str, Any],
        width: int,
        height: int,
        fit: Callable[[], tuple[int, int]],
        frames: tuple[int, ...] = (0,),
    ) -> MediaLayout:
        """The layout of these frames.

        Args:
            fit: makes their size, in units, where they are to be resized.
        """
        view = fitted_view(settings, self.unit, width, height, fit)
        grid = (-(-len(frames) // self.frames_per_patch), view.height // self.patch_size, view.width // self.patch_size)
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=(view,), frames=frames),
            num_features=math.prod(grid) // self.merge_size**2,
            num_patches=math.prod(grid),
            numbers=grid,
        )

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        self.placeholder(modality)  # refuses videos where there are none
        layout = given_grid(modality, num_features, extras, self.merge_size)
        if modality == "image" or self.tokens_per_second is None:
            return layout
        return msgspec.structs.replace(layout, times=(1.0,))  # as in transformers, where nobody says

    def positions(self, token_ids: Sequence[int], items: Sequence[MediaItem]) -> Positions | None:
        """A picture counts its rows and columns, a video its steps in time as well.

        What follows goes on behind the highest of them. Transformers did so until 5.0; since then it passes over time
        there, so that text behind a video that is longer than it is wide comes at positions within it.
        """
        return mrope_positions(token_ids, map(self._counted, items)) if items else None

    def _counted(self, item: MediaItem) -> tuple[int, np.ndarray]:
        token_id = self.placeholder(item.modality).token_id
        assert token_id is not None
        pace = self.tokens_per_second if item.layout.times else None
        return token_id, counted(item.layout.numbers, self.merge_size, pace, *item.layout.times)


def _mark(sign: Sequence[str], token_id: int) -> Placeholder:
    return Placeholder("".join(sign), token_id, re.escape(sign[1]))
