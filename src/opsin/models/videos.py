"""What the rules of video-taking families share: reading Hugging Face video-processor settings, strictly, and choosing
frames. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from opsin.errors import RequestError, UnsupportedModelError
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    check_pixels,
    read_known,
    read_norm,
    read_resample,
    request_settings,
)
from opsin.types import Clip

T = TypeVar("T")

VIDEO_PIXELS: Mapping[str, Any] = {  # what every Hugging Face video processor has inherited
    **CLIP_PIXELS,
    "default_to_square": True,
    "do_sample_frames": False,
    "num_frames": None,
    "fps": None,
    "do_center_crop": False,
    "crop_size": None,
    "do_pad": False,
}
_SKIPPED_S = 1  # by ``without_ends``, at either end
_EDGES = frozenset({"do_center_crop", "do_pad"})  # what a config for pictures says of these is for pictures


def read_video_settings(
    processor: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], *, default: str, family: str
) -> tuple[str, dict[str, Any]]:
    """The video processor's class name, and its settings, complete.

    A folder without a config for videos has them processed by what its config for pictures says, as in transformers.

    Args:
        processor: as ``ModelFiles.processor``.
        known: class name to the defaults of every setting that is implemented.
        default: the class where the config names none.

    Raises:
        UnsupportedModelError: another class, or a key that is neither implemented nor without effect.
    """
    video = processor.get("video_processor")
    if video is None:
        given = {key: processor[key] for key in set(known[default]) - _EDGES if processor.get(key) is not None}
        return default, {**known[default], **given}
    type_key = "video_processor_type"
    name, settings = read_known(type_key, video.get(type_key) or default, video, known, family)
    for key in sorted(_EDGES):
        if settings[key] and not known[name][key]:
            raise UnsupportedModelError(f"The {name} config has {key} = {settings[key]!r}, which is not implemented.")
    return name, settings


def check_video_pixels(name: str, settings: Mapping[str, Any], pictures: Mapping[str, Any], *same: str) -> None:
    """Refuse settings of the ``name`` video processor that no video can satisfy, or that the tower cannot take beside
    those of ``pictures``.

    Args:
        same: keys that must say what they say of pictures, as the normalisation must.

    Raises:
        UnsupportedModelError: names what cannot be used, or what differs.
    """
    norm = check_pixels(name, settings, read_resample)
    if norm != read_norm(pictures) or any(settings[key] != pictures[key] for key in same):
        kept = " and ".join((*same, "normalised pixels"))
        raise UnsupportedModelError(
            f"The {name} config cannot be used: its {kept} must be those of pictures; the tower takes one of each."
        )


def sample(
    clip: Clip, settings: Mapping[str, Any], options: Mapping[str, Any], pick: Callable[[Clip], Sequence[int]]
) -> Clip:
    """The clip with the frames that the family's own sampling picks, where it is asked for: by ``mm_processor_kwargs``
    (``do_sample_frames``, or ``fps`` or ``num_frames``), or by the checkpoint where no frames were chosen so far.

    Args:
        settings: with ``options`` laid over them.
        pick: indices out of ``clip.num_frames``; ``ValueError`` where the settings cannot be met.

    Raises:
        RequestError: they cannot, or the frames at hand are a selection already.
    """
    untouched = len(clip.frames) == clip.num_frames and not clip.recorded and clip.fps is not None
    wanted = options.get("do_sample_frames")
    if wanted is None:
        asked = any(options.get(key) is not None for key in ("fps", "num_frames"))
        wanted = asked or (settings["do_sample_frames"] and untouched)
    if not wanted:
        return clip
    if clip.recorded:
        raise RequestError(
            "The frames given are a selection from a video already (frames_indices), so none can be sampled of it; "
            "leave out fps, num_frames and do_sample_frames.",
            param="mm_processor_kwargs",
        )
    if settings["fps"] is not None and clip.fps is None and settings["num_frames"] is None:
        raise RequestError(
            "fps samples frames by time, but nobody told the video's own: give it as (frames, {'fps': ...}), or use "
            "num_frames.",
            param="mm_processor_kwargs",
        )
    with request_settings():
        _check_numbers(settings)
        try:
            frames = tuple(int(i) for i in pick(clip))
        except OverflowError:  # of a video that somebody calls next to endless
            raise ValueError(f"fps {settings['fps']} of {clip.duration:.3g} s of video are too many frames.") from None
        if not frames:
            raise ValueError(f"not one frame is left of {clip.duration:.3g} s of video; raise fps or num_frames.")
    return msgspec.structs.replace(clip, frames=frames)


def _check_numbers(settings: Mapping[str, Any]) -> None:
    """``ValueError`` where ``num_frames`` is not a count, or ``fps`` not a speed."""
    count, fps = settings["num_frames"], settings["fps"]
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"num_frames is {count!r}; it must be a whole number of at least 1.")
    if fps is not None and (type(fps) not in (int, float) or not 0 < fps < math.inf):
        raise ValueError(f"fps is {fps!r}; it must be a number above 0.")


def spread(clip: Clip, settings: Mapping[str, Any]) -> Sequence[int]:
    """Frames at equal distances from the first on, ``num_frames`` of them or as many as ``fps`` makes: what Hugging
    Face's video processors sample where theirs has no rule of its own. ``ValueError`` where there are too few."""
    total, count = clip.num_frames, settings["num_frames"]
    if count is None and settings["fps"] is not None:
        assert clip.fps is not None
        count = max(1, int(total / clip.fps * settings["fps"]))
    if count is None:
        return range(total)
    check_enough(clip, count)
    return [i * total // count for i in range(count)]


def check_enough(clip: Clip, count: object) -> None:
    """``ValueError`` where ``count`` is no whole number of frames, or more than the video has."""
    if type(count) is not int or not 1 <= count <= clip.num_frames:
        raise ValueError(
            f"{count} frames cannot be sampled from a video of {clip.num_frames}; choose another num_frames or fps."
        )


def spaced(total: int, count: int, start: float = 0.0) -> list[int]:
    """Indices below ``total`` from ``start`` in steps of ``total / count``, rounded as torch's ``arange`` rounds.

    Where that arrives at ``total`` itself, which has no frame, transformers fails and this leaves it out.
    """
    step = total / count
    steps = np.arange(math.ceil((total - start) / step)) * step + start
    return [i for i in steps.astype(np.float32).astype(np.int64).tolist() if i < total]


def spaced_in_steps(clip: Clip, settings: Mapping[str, Any], step: int) -> Sequence[int]:
    """As ``spaced``, ``num_frames`` of them or as many as ``fps`` makes between ``min_frames`` and ``max_frames``, in
    whole steps; all of them where neither is said. ``ValueError`` where both are, or where there are too few.

    Source: HF ``Qwen2VLVideoProcessor.sample_frames``.
    """
    total, count, fps = clip.num_frames, settings["num_frames"], settings["fps"]
    if count is not None and fps is not None:
        raise ValueError("num_frames and fps exclude one another; give one.")
    if count is not None:
        count = round(count / step) * step
    elif fps is not None:
        assert clip.fps is not None
        most = math.floor(min(settings["max_frames"], total) / step) * step
        wanted = min(max(total / clip.fps * fps, settings["min_frames"]), most, total)
        count = math.floor(wanted / step) * step
    else:
        return range(total)
    check_enough(clip, count)
    return spaced(total, count)


def without_ends(clip: Clip, settings: Mapping[str, Any]) -> Sequence[int]:
    """``fps`` frames a second, at most ``num_frames``, at equal distances; of a long video without its first and last
    second. ``ValueError`` where one of the two, or the video's own speed, is unknown.

    Source: HF ``SmolVLMVideoProcessor.sample_frames``.
    """
    fps, most = settings["fps"], settings["num_frames"]
    if clip.fps is None or not fps or not most:
        raise ValueError(
            f"fps is {fps!r}, num_frames {most!r} and the video's own speed {clip.fps!r}; to sample frames, this model "
            "needs all three."
        )
    last = clip.num_frames - 1
    start, end = 0, last
    if clip.duration - 2 * _SKIPPED_S > most * fps:
        start = int(_SKIPPED_S * clip.fps)
        end = min(int(clip.num_frames - _SKIPPED_S * clip.fps), last)
        if start >= end:
            start, end = 0, last
    count = max(1, min(round(fps * clip.duration), most))
    if count > end - start:
        return range(start, end + 1)
    return np.unique(np.linspace(start, end, count, dtype=int)).tolist()


def whole_steps(values: tuple[T, ...], step: int) -> tuple[T, ...]:
    """As many as are multiples of ``step``, the last one repeated."""
    return (*values, *values[-1:] * (-len(values) % step))
