"""Qwen3-VL's pictures, which are Qwen2-VL's, and its videos: pictures with the time written before each.

Source: Hugging Face ``Qwen3VLProcessor``, ``Qwen3VLVideoProcessor`` and ``Qwen3VLModel.get_rope_index``;
arXiv:2511.21631.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import msgspec
import numpy as np

from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.models.pictures import request_settings, with_options
from opsin.models.qwen2_vl.rule import GEOMETRY, Qwen2VLRule, pixel_bounds, text_positions
from opsin.models.rule import Placeholder, Positions, TokenIds, TokenRun
from opsin.models.videos import VIDEO_PIXELS, sample
from opsin.types import Clip, MediaItem, MediaLayout, Modality

_TAGS = ("<|vision_start|>", "<|vision_end|>")
_VIDEO = "<|video_pad|>"
_MAX_ASPECT_RATIO = 200
_VIDEO_PROCESSORS: dict[str, dict[str, Any]] = {
    "Qwen3VLVideoProcessor": {
        **VIDEO_PIXELS,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "do_sample_frames": True,
        "fps": 2,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "min_pixels": None,
        "max_pixels": None,
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_frames": 4,
        "max_frames": 768,
        "cap_pixels_per_frame": False,
        "max_video_tokens": 768,
    }
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
    video_processors: ClassVar[Mapping[str, Mapping[str, Any]]] = _VIDEO_PROCESSORS
    default_video_processor: ClassVar[str] = "Qwen3VLVideoProcessor"
    default_patch_size: ClassVar[int] = 16

    tags: tuple[int, ...] = ()
    video_token_id: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        tags = tuple(i for i in map(tokenizer.convert_tokens_to_ids, _TAGS) if i is not None)
        if len(tags) != len(_TAGS):
            raise UnsupportedModelError(f"The tokenizer lacks one of {', '.join(_TAGS)}.")
        rule = replace(super().from_hf(config, processor, tokenizer), tags=tags)
        if rule.video_mark is None:
            return rule
        begin, end = map(re.escape, _TAGS)  # every step has its own, so those around the mark go
        mark = Placeholder(rule.video_mark.text, None, f"(?:{begin})?{re.escape(_VIDEO)}(?:{end})?")
        return replace(rule, video_token_id=rule.video_mark.token_id, video_mark=mark)

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        settings = with_options(self.video_settings, options, fixed=frozenset(GEOMETRY), others=self.settings)
        clip = sample(clip, settings, options, lambda clip: _sampled(clip, settings, options))
        with request_settings():
            bounds = pixel_bounds(settings)
        least, most = bounds["shortest_edge"], bounds["longest_edge"]
        count = max(len(clip.frames), self.frames_per_patch)
        if settings["cap_pixels_per_frame"]:
            cap = min(settings["max_video_tokens"] * self.unit**2, most // count)
            most = max(cap, int(least * 1.05)) * count
        width, height = clip.width, clip.height
        size = resize_video(width, height, count, self.frames_per_patch, self.unit, least, most)
        layout = self.laid_out(width, height, self.padded(clip.frames), settings, lambda: size)
        seconds = self.padded_times(clip.times)
        return msgspec.structs.replace(layout, times=seconds)

    def padded_times(self, times: tuple[float, ...]) -> tuple[float, ...]:
        """The time of each step of a video's grid: halfway between its first and its last frame."""
        step = self.frames_per_patch
        times = (*times, *times[-1:] * (-len(times) % step))
        return tuple((times[i] + times[i + step - 1]) / 2 for i in range(0, len(times), step))

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        if modality == "video" and self.video_token_id is not None:
            raise RequestError(
                "This model takes no embeddings of videos, since its prompts hold the time of every frame; give the "
                "video itself, or its frames as pictures.",
                param="multi_modal_data",
            )
        return super().embedding_layout(modality, num_features, extras)

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        if modality == "image":
            return super().expand(modality, index, layout)
        assert self.video_token_id is not None
        begin, end = map(TokenRun, self.tags)
        step = TokenRun(self.video_token_id, layout.num_features // layout.numbers[0], is_feature=True)
        return [part for time in layout.times for part in (f"<{time:.1f} seconds>", begin, step, end)]

    def positions(self, token_ids: Sequence[int], items: Sequence[MediaItem]) -> Positions | None:
        """Text counts on all three axes; a picture, and each step of a video, counts its rows and columns, and takes as
        many as the longer side. Linear in the prompt.
        """
        if not items:
            return None
        parts: list[np.ndarray] = []
        done = position = 0  # the next token, and its position
        for item in items:
            steps = item.layout.numbers[0]
            rows, cols = (size // self.merge_size for size in item.layout.numbers[1:])
            token_id = self.image_token_id if item.modality == "image" else self.video_token_id
            assert token_id is not None
            for _ in range(steps):
                start = token_ids.index(token_id, done)
                parts.append(text_positions(position, start - done))
                position += start - done
                parts.append(np.indices((1, rows, cols)).reshape(3, -1) + position)
                position += max(rows, cols)
                done = start + rows * cols
        parts.append(text_positions(position, len(token_ids) - done))
        return Positions(np.concatenate(parts, axis=1).tolist(), delta=position - done)


def resize_video(
    width: int, height: int, num_frames: int, step: int, unit: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(width, height) in multiples of ``unit``, the pixels of all frames within bounds where they can be, rounded as
    Hugging Face does.

    Raises:
        MediaError: one side is more than 200 times the other.
    """
    if min(width, height) < unit:
        scale = max(unit / height, unit / width)
        width, height = int(width * scale), int(height * scale)
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise MediaError(
            f"Frames of {width} x {height} pixels are too narrow: this model takes sides that differ by at most "
            f"{_MAX_ASPECT_RATIO} times. Crop them, or pad them to a squarer shape.",
            code="image_too_small",
        )
    pixels = round(num_frames / step) * step * round(width / unit) * round(height / unit) * unit**2
    if pixels > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        shrunk = [max(unit, math.floor(side / shrink / unit) * unit) for side in (width, height)]
        return shrunk[0], shrunk[1]
    if pixels < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        return math.ceil(width * grow / unit) * unit, math.ceil(height * grow / unit) * unit
    return round(width / unit) * unit, round(height / unit) * unit


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
    if type(count) is not int or not 1 <= count <= total:
        raise ValueError(f"{count} frames cannot be sampled from a video of {total}; choose another num_frames or fps.")
    return [int(i) for i in np.linspace(0, total - 1, count).round()]
