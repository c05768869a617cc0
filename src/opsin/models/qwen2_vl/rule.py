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

from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.media.ops import output_size
from opsin.models.picture_rule import PictureRule, given_features, images_only
from opsin.models.pictures import (
    CLIP_PIXELS,
    checkpoint_settings,
    read_norm,
    read_resample,
    read_settings,
    request_settings,
    with_options,
)
from opsin.models.rule import Placeholder, Positions, TokenIds
from opsin.models.videos import VIDEO_PIXELS, read_video_settings, sample, spaced
from opsin.types import Clip, MediaItem, MediaLayout, Modality, PixelPlan, Resize, View

_MAX_ASPECT_RATIO = 200
_IMAGE_TOKEN, _VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
GEOMETRY = ("patch_size", "merge_size", "temporal_patch_size")
_TOWER_GEOMETRY = (("patch_size", 14), ("spatial_merge_size", 2), ("temporal_patch_size", 2))
_PROCESSORS: dict[str, dict[str, Any]] = {
    "Qwen2VLImageProcessor": {
        **CLIP_PIXELS,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "min_pixels": None,
        "max_pixels": None,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
}
_VIDEO_PROCESSORS: dict[str, dict[str, Any]] = {
    "Qwen2VLVideoProcessor": {
        **VIDEO_PIXELS,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "min_pixels": None,
        "max_pixels": None,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_frames": 4,
        "max_frames": 768,
        "cap_pixels_per_frame": False,
        "max_video_tokens": 128000,
    }
}


@dataclass(frozen=True, kw_only=True)
class Qwen2VLRule(PictureRule):
    """The ``MediaRule`` of ``Qwen2VLForConditionalGeneration`` and ``Qwen2_5_VLForConditionalGeneration``.

    A layout's ``numbers`` are the grid (time, rows, columns) in patches; ``merge_size`` squared of them make one
    feature. A video's ``times`` is what one step of its grid takes, in seconds.

    Attributes:
        frames_per_patch: along time; an odd number of frames is made even by repeating the last.
        tokens_per_second: how fast a video's positions count; None counts the grid's steps.
    """

    family: ClassVar[str] = "Qwen2-VL and Qwen2.5-VL"
    video_processors: ClassVar[Mapping[str, Mapping[str, Any]]] = _VIDEO_PROCESSORS
    default_video_processor: ClassVar[str] = "Qwen2VLVideoProcessor"
    default_patch_size: ClassVar[int] = 14

    patch_size: int
    merge_size: int
    frames_per_patch: int
    video_settings: Mapping[str, Any]
    tokens_per_second: float | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        name, settings = read_settings(processor, _PROCESSORS, default="Qwen2VLImageProcessor", family=cls.family)
        vision = {"patch_size": cls.default_patch_size, **(config.get("vision_config") or {})}
        built = tuple(vision.get(key, default) for key, default in _TOWER_GEOMETRY)
        given = tuple(settings[key] for key in GEOMETRY)
        if built != given:
            raise UnsupportedModelError(f"The {name} config has {GEOMETRY} = {given}, but vision_config has {built}.")
        token_id = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
        if token_id is None or token_id != config.get("image_token_id", token_id):
            raise UnsupportedModelError(
                f"The tokenizer's id of {_IMAGE_TOKEN!r} is {token_id}; config.json's image_token_id is "
                f"{config.get('image_token_id')}. They must be the same."
            )
        video_name, video_settings = read_video_settings(
            processor, cls.video_processors, default=cls.default_video_processor, family=cls.family
        )
        for of, made in ((name, settings), (video_name, video_settings)):
            with checkpoint_settings(of):
                made["size"] = pixel_bounds(made)
                norm = read_norm(made)
                read_resample(made)
            made["min_pixels"] = made["max_pixels"] = None  # said by size from here on, which options may override
        norm = read_norm(settings)
        if norm != read_norm(video_settings) or any(video_settings[key] != settings[key] for key in GEOMETRY):
            raise UnsupportedModelError(
                f"The {video_name} config differs from the {name} config in {', '.join(GEOMETRY)} or in how pixels "
                "are normalised; the tower takes one of each."
            )
        video_id = tokenizer.convert_tokens_to_ids(_VIDEO_TOKEN)
        if video_id is not None and video_id != config.get("video_token_id", video_id):
            raise UnsupportedModelError(
                f"The tokenizer's id of {_VIDEO_TOKEN!r} is {video_id}; config.json's video_token_id is "
                f"{config.get('video_token_id')}. They must be the same."
            )
        counts_time = config.get("model_type") == "qwen2_5_vl"
        return cls(
            patch_size=settings["patch_size"],
            merge_size=settings["merge_size"],
            frames_per_patch=settings["temporal_patch_size"],
            video_settings=video_settings,
            tokens_per_second=vision.get("tokens_per_second", 4) if counts_time else None,
            mark=_mark(_IMAGE_TOKEN, token_id),
            video_mark=None if video_id is None else _mark(_VIDEO_TOKEN, video_id),
            image_token_id=token_id,
            norm=norm,
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=frozenset(GEOMETRY), others=self.video_settings)
        with request_settings():
            bounds = pixel_bounds(settings)
        least, most = bounds["shortest_edge"], bounds["longest_edge"]
        return self.laid_out(width, height, (0,), settings, lambda: smart_resize(width, height, self.unit, least, most))

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        settings = with_options(self.video_settings, options, fixed=frozenset(GEOMETRY), others=self.settings)
        clip = sample(clip, settings, options, lambda clip: _sampled(clip, settings, self.frames_per_patch))
        with request_settings():
            bounds = pixel_bounds(settings)
        least, most = bounds["shortest_edge"], bounds["longest_edge"]
        if settings["cap_pixels_per_frame"]:
            total = int(settings["max_video_tokens"] * self.unit * self.unit * 0.9)
            most = max(min(most, total * self.frames_per_patch // len(clip.frames)), int(least * 1.05))
        width, height = clip.width, clip.height
        layout = self.laid_out(
            width,
            height,
            self.padded(clip.frames),
            settings,
            lambda: smart_resize(width, height, self.unit, least, most),
        )
        if self.tokens_per_second is None:
            return layout
        return msgspec.structs.replace(layout, times=(self.frames_per_patch / clip.chosen_fps,))

    @property
    def unit(self) -> int:
        """Pixels along a feature's side."""
        return self.patch_size * self.merge_size

    def padded(self, frames: tuple[int, ...]) -> tuple[int, ...]:
        """A video's frames in whole patches, the last one repeated."""
        return (*frames, *frames[-1:] * (-len(frames) % self.frames_per_patch))

    def laid_out(
        self,
        width: int,
        height: int,
        frames: tuple[int, ...],
        settings: Mapping[str, Any],
        fit: Callable[[], tuple[int, int]],
    ) -> MediaLayout:
        """The layout of these frames.

        Args:
            fit: makes their size, in units, where they are to be resized.
        """
        unit = self.unit
        ops: tuple[Resize, ...] = ()
        if settings["do_resize"]:
            with request_settings():
                resample = read_resample(settings)
            ops = (Resize(*fit(), resample),)
        elif width % unit or height % unit:
            raise RequestError(
                f"Without do_resize, sides must be multiples of {unit}, not {width} x {height}.",
                param="multi_modal_data",
            )
        made_width, made_height = output_size(ops, width, height)
        view = View(ops, height=made_height, width=made_width)
        grid = (-(-len(frames) // self.frames_per_patch), made_height // self.patch_size, made_width // self.patch_size)
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=(view,), frames=frames),
            num_features=math.prod(grid) // self.merge_size**2,
            num_patches=math.prod(grid),
            numbers=grid,
        )

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        self.placeholder(modality)  # refuses videos where there are none
        key = f"{modality}_grid_thw"
        most_frames = "1" if modality == "image" else "time"
        if set(extras) != {key}:
            raise RequestError(
                f"{modality.capitalize()} embeddings of this model come with their grids, since positions depend on "
                f"them: {{'{modality}_embeds': tensor, '{key}': [({most_frames}, rows, columns)]}}, in patches.",
                param="multi_modal_data",
            )
        grid = extras[key]
        merge = self.merge_size
        fits = math.prod(grid) == num_features * merge**2 and not any(size % merge for size in grid[1:])
        if not fits or (modality == "image" and grid[0] != 1):
            raise RequestError(
                f"{key} is {grid} for {num_features} features; it must be {most_frames} and two multiples of {merge}, "
                f"with a product of {merge**2} times the number of features.",
                param="multi_modal_data",
            )
        layout = given_features(num_features, tuple(grid))
        if modality == "image" or self.tokens_per_second is None:
            return layout
        return msgspec.structs.replace(layout, times=(1.0,))  # as in transformers, where nobody says

    def positions(self, token_ids: Sequence[int], items: Sequence[MediaItem]) -> Positions | None:
        """Text counts on all three axes; a picture counts its rows and columns, a video its steps in time as well. What
        follows goes on behind the highest position so far, as in the papers and in training.

        Transformers did so until 5.0; since then it passes over time there, so that text behind a video that is longer
        than it is wide comes at positions within it. Linear in the prompt.
        """
        if not items:
            return None
        parts: list[np.ndarray] = []
        done = position = 0  # the next token, and its position
        for item in items:
            token_id = self.placeholder(item.modality).token_id
            assert token_id is not None
            start = token_ids.index(token_id, done)
            steps = item.layout.numbers[0]
            rows, cols = (size // self.merge_size for size in item.layout.numbers[1:])
            parts.append(text_positions(position, start - done))
            position += start - done
            counted = np.indices((steps, rows, cols)).reshape(3, -1)
            if item.layout.times and self.tokens_per_second is not None:
                step = np.float32(self.tokens_per_second) * np.float32(item.layout.times[0])  # rounded as torch does
                counted[0] = (counted[0].astype(np.float32) * step).astype(np.int64)
            parts.append(counted + position)
            position += int(counted.max()) + 1
            done = start + steps * rows * cols
        parts.append(text_positions(position, len(token_ids) - done))
        axes = np.concatenate(parts, axis=1).tolist()
        return Positions(axes, delta=position - done)


def smart_resize(width: int, height: int, unit: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) in multiples of ``unit``, the area within bounds where it can be, rounded as Hugging Face does.

    Raises:
        MediaError: one side is more than 200 times the other.
    """
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise MediaError(
            f"A picture of {width} x {height} pixels is too narrow: this model takes sides that differ by at most "
            f"{_MAX_ASPECT_RATIO} times. Crop it, or pad it to a squarer shape.",
            code="image_too_small",
        )
    area = round(width / unit) * round(height / unit) * unit**2
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        shrunk = [max(unit, math.floor(side / shrink / unit) * unit) for side in (width, height)]
        return shrunk[0], shrunk[1]
    if area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(width * grow / unit) * unit, math.ceil(height * grow / unit) * unit
    return round(width / unit) * unit, round(height / unit) * unit


def _sampled(clip: Clip, settings: Mapping[str, Any], factor: int) -> Sequence[int]:
    """The frames that Hugging Face's video processor samples. ``ValueError`` where there are too few."""
    total, count, fps = clip.num_frames, settings["num_frames"], settings["fps"]
    if count is not None and fps is not None:
        raise ValueError("num_frames and fps exclude one another; give one.")
    if count is not None:
        count = round(count / factor) * factor
    elif fps is not None:
        assert clip.fps is not None
        most = math.floor(min(settings["max_frames"], total) / factor) * factor
        wanted = min(max(total / clip.fps * fps, settings["min_frames"]), most, total)
        count = math.floor(wanted / factor) * factor
    else:
        return range(total)
    if not 1 <= count <= total:
        raise ValueError(f"{count} frames cannot be sampled from a video of {total}; choose another num_frames or fps.")
    return spaced(total, count)


def _mark(token: str, token_id: int) -> Placeholder:
    """Prompts hold the pad between two tags that stay; the pad alone is what expands."""
    return Placeholder(f"<|vision_start|>{token}<|vision_end|>", token_id, re.escape(token))


def pixel_bounds(settings: Mapping[str, Any]) -> dict[str, int]:
    """{"shortest_edge", "longest_edge"}: despite their names, areas. ``ValueError`` where they are not."""
    size = dict(settings["size"]) if isinstance(settings["size"], Mapping) else {}
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if settings[name] is not None:
            size[edge] = settings[name]
            size.pop(name, None)
    if set(size) != {"shortest_edge", "longest_edge"} or not all(type(v) is int and v >= 1 for v in size.values()):
        raise ValueError(
            f"size is {settings['size']!r}, min_pixels {settings['min_pixels']!r} and max_pixels "
            f"{settings['max_pixels']!r}; the least and the most pixels must be whole numbers of at least 1, as "
            "size = {'shortest_edge': least, 'longest_edge': most} or by their names."
        )
    return size


def text_positions(position: int, count: int) -> np.ndarray:
    """(3, count): all axes alike."""
    return np.tile(np.arange(position, position + count), (3, 1))
