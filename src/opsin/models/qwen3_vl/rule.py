"""Qwen3-VL's pictures, which are Qwen2-VL's, and its videos: pictures with the time written before each.

Source: Hugging Face ``Qwen3VLProcessor``, ``Qwen3VLVideoProcessor`` and ``Qwen3VLModel.get_rope_index``;
arXiv:2511.21631.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import msgspec
import numpy as np

from opsin.models.mrope import mrope_positions, steps_counted
from opsin.models.picture_rule import no_video_embeddings
from opsin.models.picture_settings import SIGLIP_NORM, with_options
from opsin.models.placeholders import token_ids
from opsin.models.qwen2_vl.rule import GEOMETRY, VIDEO_DEFAULTS, Qwen2VLRule
from opsin.models.rule import Placeholder, Positions, TokenIds, TokenRun
from opsin.models.smart_resize import own_size, requested_bounds, resize_video
from opsin.models.videos import check_enough, sample, whole_steps
from opsin.types import Clip, MediaItem, MediaLayout, Modality

_TAGS = ("<|vision_start|>", "<|vision_end|>")
_VIDEO = "<|video_pad|>"
_VIDEO_DEFAULTS: Mapping[str, Any] = {
    **VIDEO_DEFAULTS,
    **own_size(16, 128 * 32 * 32, 32 * 32 * 768),
    **SIGLIP_NORM,
    "do_sample_frames": True,
    "fps": 2,
    "max_video_tokens": 768,
}


@dataclass(frozen=True, kw_only=True)
class Qwen3VLRule(Qwen2VLRule):
    """The ``MediaRule`` of ``Qwen3VLForConditionalGeneration``.

    A video's ``times`` are those of the steps of its grid, in seconds.

    Attributes:
        tags: the tokens before and behind what a step comes to.
        video_token_id: None where the tokenizer has no token for videos.
    """

    family: ClassVar[str] = "Qwen3-VL"
    video_processors: ClassVar[Mapping[str, Mapping[str, Any]]] = {"Qwen3VLVideoProcessor": _VIDEO_DEFAULTS}
    default_patch_size: ClassVar[int] = 16

    tags: tuple[int, ...] = ()
    video_token_id: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        rule = replace(super().from_hf(config, processor, tokenizer), tags=token_ids(tokenizer, *_TAGS))
        if rule.video_mark is None:
            return rule
        begin, end = map(re.escape, _TAGS)  # every step has its own, so those around the mark go
        mark = Placeholder(rule.video_mark.text, None, f"(?:{begin})?{re.escape(_VIDEO)}(?:{end})?")
        return replace(rule, video_token_id=rule.video_mark.token_id, video_mark=mark)

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        settings = with_options(self.video_settings, options, fixed=frozenset(GEOMETRY), others=self.settings)
        clip = sample(clip, settings, options, lambda clip: _sampled(clip, settings, options))
        least, most = requested_bounds(settings)
        count = max(len(clip.frames), self.frames_per_patch)
        if settings["cap_pixels_per_frame"]:
            cap = min(settings["max_video_tokens"] * self.unit**2, most // count)
            most = max(cap, int(least * 1.05)) * count
        width, height = clip.width, clip.height
        size = resize_video(width, height, count, self.frames_per_patch, self.unit, least, most)
        layout = self.laid_out(settings, width, height, lambda: size, whole_steps(clip.frames, self.frames_per_patch))
        return msgspec.structs.replace(layout, times=self.padded_times(clip.times))

    def padded_times(self, times: tuple[float, ...]) -> tuple[float, ...]:
        """The time of each step of a video's grid: halfway between its first and its last frame."""
        step = self.frames_per_patch
        times = whole_steps(times, step)
        return tuple((times[i] + times[i + step - 1]) / 2 for i in range(0, len(times), step))

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        if modality == "video" and self.video_token_id is not None:
            raise no_video_embeddings()
        return super().embedding_layout(modality, num_features, extras)

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        if modality == "image":
            return super().expand(modality, index, layout)
        assert self.video_token_id is not None
        begin, end = map(TokenRun, self.tags)
        step = TokenRun(self.video_token_id, layout.num_features // layout.numbers[0], is_feature=True)
        return [part for time in layout.times for part in (f"<{time:.1f} seconds>", begin, step, end)]

    def positions(self, token_ids: Sequence[int], items: Sequence[MediaItem]) -> Positions | None:
        """A picture, and each step of a video, counts its rows and columns."""
        return mrope_positions(token_ids, (run for item in items for run in self._runs(item))) if items else None

    def _runs(self, item: MediaItem) -> list[tuple[int, np.ndarray]]:
        token_id = self.image_token_id if item.modality == "image" else self.video_token_id
        assert token_id is not None
        return [(token_id, step_3M) for step_3M in steps_counted(item.layout.numbers, self.merge_size)]


def _sampled(clip: Clip, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Sequence[int]:
    """The frames that Hugging Face's video processor samples. ``ValueError`` where there are none."""
    if options.get("num_frames") is not None and options.get("fps") is not None:
        raise ValueError("num_frames and fps exclude one another; give one.")
    total, count, fps = clip.num_frames, settings["num_frames"], settings["fps"]
    if count is None and fps is not None:
        assert clip.fps is not None
        count = int(total / clip.fps * fps)
        count = min(max(count, settings["min_frames"]), settings["max_frames"], total)
    elif count is None:
        count = min(max(total, settings["min_frames"]), settings["max_frames"], total)
    check_enough(clip, count)
    return [int(i) for i in np.linspace(0, total - 1, count).round()]
