"""GLM-4.1V's and GLM-4.6V-Flash's pictures: each at its own resolution, in whole merge units; M-RoPE positions. Their
videos are pictures with the time written behind each.

Source: Hugging Face ``Glm4vImageProcessor``, ``Glm4vVideoProcessor``, ``Glm4vProcessor``, their GLM-4.6V sisters and
``Glm4vModel.get_rope_index``; arXiv:2507.01006.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import msgspec
import numpy as np

from opsin.errors import UnsupportedModelError
from opsin.models.mrope import mrope_positions, steps_counted
from opsin.models.picture_rule import images_only, no_video_embeddings
from opsin.models.picture_settings import CLIP_PIXELS, with_options
from opsin.models.placeholders import token_ids
from opsin.models.qwen2_vl.rule import GEOMETRY, Qwen2VLRule
from opsin.models.rule import Positions, TokenIds, TokenRun
from opsin.models.smart_resize import requested_bounds, resize_video
from opsin.models.videos import VIDEO_PIXELS, sample, whole_steps
from opsin.types import Clip, MediaItem, MediaLayout, Modality

_PATCHES = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
_PICTURES = {**CLIP_PIXELS, **_PATCHES, "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}}
_VIDEOS = {
    **VIDEO_PIXELS,
    **_PATCHES,
    "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30000},
    "max_image_size": {"longest_edge": 28 * 28 * 2 * 30000},
    "do_sample_frames": True,
    "num_frames": 16,
    "fps": 2,
    "max_duration": 300,
}
_JOINT = {"Glm4vProcessor": "Glm4v", "Glm46VProcessor": "Glm46V"}
_INERT = frozenset({"max_image_size", "num_frames"})  # of videos, in transformers
_MOST_SAMPLES = 100_000  # of one video: no video has so many frames to choose, but a request can ask for them


@dataclass(frozen=True, kw_only=True)
class Glm4vRule(Qwen2VLRule):
    """The ``MediaRule`` of ``Glm4vForConditionalGeneration`` and ``Glm46VForConditionalGeneration``. Which of the two a
    checkpoint's videos are for, its processors say: GLM-4.6V-Flash has been released under the former's name.

    A video's ``times`` are those of the first frames of its grid's steps, in seconds.

    Attributes:
        tags: the tokens before and behind what a step of a video comes to.
        is_4_6: times are written to a tenth of a second, not as whole ones.
        samples_by_length: so are videos: as many frames a second as their length has, whatever is asked.
    """

    family: ClassVar[str] = "GLM-4.1V and GLM-4.6V"
    image_processors: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Glm4vImageProcessor": _PICTURES,
        "Glm46VImageProcessor": _PICTURES,
    }
    video_processors: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Glm4vVideoProcessor": _VIDEOS,
        "Glm46VVideoProcessor": _VIDEOS,
    }
    image_sign: ClassVar[Sequence[str]] = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
    video_sign: ClassVar[Sequence[str]] = ("<|begin_of_video|>", "<|video|>", "<|end_of_video|>")

    tags: tuple[int, ...] = ()
    is_4_6: bool = False
    samples_by_length: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        begin, _, end = cls.image_sign
        rule = replace(super().from_hf(config, processor, tokenizer), tags=token_ids(tokenizer, begin, end))
        video_kind = (processor.get("video_processor") or {}).get("video_processor_type")
        _, default = cls.default_processors(config, processor)
        return replace(
            rule,
            is_4_6=_version(config, processor) == "Glm46V",
            samples_by_length=(video_kind or default) == "Glm46VVideoProcessor",
        )

    @classmethod
    def default_processors(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> tuple[str, str]:
        version = _version(config, processor)
        return f"{version}ImageProcessor", f"{version}VideoProcessor"

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=frozenset(GEOMETRY), others=self.video_settings)
        bounds = requested_bounds(settings)
        step = self.frames_per_patch  # a picture counts as so many frames
        return self.laid_out(
            settings, width, height, lambda: resize_video(width, height, step, step, self.unit, *bounds)
        )

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        fixed = {*GEOMETRY, *_INERT, *(("fps", "max_duration") if self.samples_by_length else ())}
        settings = with_options(self.video_settings, options, fixed=frozenset(fixed), others=self.settings)
        clip = sample(clip, settings, options, lambda clip: self._sampled(clip, settings))
        bounds = requested_bounds(settings)
        width, height, step = clip.width, clip.height, self.frames_per_patch
        count = max(len(clip.frames), step)
        layout = self.laid_out(
            settings,
            width,
            height,
            lambda: resize_video(width, height, count, step, self.unit, *bounds),
            whole_steps(clip.frames, step),
        )
        return msgspec.structs.replace(layout, times=clip.times[::step])

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        if modality == "video" and self.video_mark is not None:
            raise no_video_embeddings()
        return super().embedding_layout(modality, num_features, extras)

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        """A video is as many pictures as its grid has steps, each with its time behind it."""
        if modality == "image":
            return super().expand(modality, index, layout)
        begin, end = map(TokenRun, self.tags)
        step = TokenRun(self.image_token_id, layout.num_features // layout.numbers[0], is_feature=True)
        return [part for time in layout.times for part in (begin, step, end, self._written(time))]

    def positions(self, token_ids: Sequence[int], items: Sequence[MediaItem]) -> Positions | None:
        """A picture, and each step of a video, counts its rows and columns."""
        grids = [item.layout.numbers for item in items]
        runs = [(self.image_token_id, run_3M) for grid in grids for run_3M in steps_counted(grid, self.merge_size)]
        return mrope_positions(token_ids, runs) if items else None

    def _written(self, time: float) -> str:
        return f"{time:.1f} seconds" if self.is_4_6 else f"{int(time)}"

    def _sampled(self, clip: Clip, settings: Mapping[str, Any]) -> Sequence[int]:
        """The frames that Hugging Face's video processor samples, an even number; ``ValueError`` where it cannot."""
        if clip.fps is None:
            raise ValueError("this model samples frames by time, but nobody told the video's own fps.")
        if self.samples_by_length:
            frames = _by_length(clip, clip.fps, self.frames_per_patch)
        else:
            frames = _by_speed(clip, clip.fps, settings["fps"], settings["max_duration"])
        return whole_steps(tuple(dict.fromkeys(frames)), 2)


def _version(config: Mapping[str, Any], processor: Mapping[str, Any]) -> str:
    """Which of the two a folder's processors are.

    Raises:
        UnsupportedModelError: neither.
    """
    joint = processor.get("processor_class")
    if joint is None:
        return "Glm46V" if config.get("model_type") == "glm46v" else "Glm4v"
    if joint not in _JOINT:
        raise UnsupportedModelError(
            f"processor_class is {joint!r}; implemented for GLM-4.1V and GLM-4.6V are {', '.join(_JOINT)}."
        )
    return _JOINT[joint]


def _by_speed(clip: Clip, fps: float, wanted: float, max_duration: float) -> list[int]:
    """``wanted`` frames a second; of a longer video than ``max_duration`` seconds as many as of one of that length."""
    total, last = clip.num_frames, clip.num_frames - 1
    is_long = clip.duration > max_duration
    count = int(max_duration * wanted) if is_long else max(math.floor(clip.duration * wanted), 1)
    if is_long and count >= total:
        return list(range(total))
    if count > _MOST_SAMPLES:
        raise ValueError(f"fps {wanted} of {clip.duration:.3g} s of video are too many frames.")
    if is_long:
        return [min(last, math.ceil(time * fps)) for time in np.linspace(0, clip.duration, count).tolist()]
    return [min(last, math.ceil(i * fps / wanted)) for i in range(count)]


def _by_length(clip: Clip, fps: float, frames_per_patch: int) -> list[int]:
    """The longer a video, the fewer frames a second, and no more than of 40 minutes, or 640."""
    total, duration = clip.num_frames, clip.duration
    counted = min(duration, 2400)
    wanted = (3 if counted <= 30 else 1 if counted <= 300 else 0.5) * frames_per_patch
    count = max(1, min(int(counted * wanted), 640))
    if total < count:
        return _evenly(0, total - 1, count)
    frames: list[int] = []
    due, frame = 0.0, 0
    while len(frames) <= count and due < max(int(duration), 1e-9):
        while frame * (1 / fps) < due:  # few steps: from just below where it must be
            frame += 1
        if frame >= total:
            break
        frames.append(frame)
        due += 1 / wanted
        frame = max(frame + 1, int(due * fps) - 1)
    if len(frames) < count:
        return _evenly(frames[0], frames[-1], count)
    return _evenly(0, total - 1, count) if len(frames) > count else frames


def _evenly(first: int, last: int, count: int) -> list[int]:
    return np.linspace(first, last, count, dtype=int).tolist()
