"""The pictures of Idefics3 and SmolVLM: tiles of the whole, each behind a tag of its row and column; an overview.
SmolVLM's videos: frames, each behind the time when it was.

Source: Hugging Face ``Idefics3ImageProcessor`` and ``SmolVLMImageProcessor`` (Pillow-backed), ``Idefics3Processor``,
``SmolVLMVideoProcessor`` and ``SmolVLMProcessor``; arXiv:2408.12637 and arXiv:2504.05299.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import msgspec
import numpy as np

from opsin.errors import RequestError, UnsupportedModelError
from opsin.media.ops import output_size
from opsin.models.picture_rule import PictureRule, given_features, given_size, images_only
from opsin.models.pictures import (
    CLIP_PIXELS,
    checkpoint_settings,
    read_image_token,
    read_longest_size,
    read_norm,
    read_resample,
    read_settings,
    request_settings,
    with_options,
)
from opsin.models.rule import Placeholder, TokenIds, TokenRun
from opsin.models.videos import VIDEO_PIXELS, read_video_settings, sample
from opsin.types import DEFAULT_FPS, Clip, MediaLayout, Modality, PixelOp, PixelPlan, Resize, View

_FAKE, _GLOBAL, _VIDEO = "<fake_token_around_image>", "<global-img>", "<video>"
_LONGEST_EDGE = 4096  # whatever the settings ask for
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_LONGEST_S = 10**9
_SKIPPED_S = 1  # of a long video, at either end
_DEFAULTS: dict[str, Any] = {
    **CLIP_PIXELS,
    "resample": 1,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "do_pad": True,  # tiles have one size, so there is nothing to fill up
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "image_seq_len": None,
    "return_row_col_info": None,
    "video_sampling": None,
}
_PROCESSORS = {"Idefics3ImageProcessor": _DEFAULTS, "SmolVLMImageProcessor": _DEFAULTS}
_VIDEO_PROCESSORS: dict[str, dict[str, Any]] = {
    "SmolVLMVideoProcessor": {
        **VIDEO_PIXELS,
        **{key: _DEFAULTS[key] for key in ("resample", "size", "max_image_size", "do_pad", "image_mean", "image_std")},
        "video_sampling": None,
    }
}
_FIXED = frozenset({"max_image_size", "image_seq_len", "video_sampling"})


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile on its way through tower and pixel shuffle.

    Attributes:
        edge: of the square that the tower takes, in pixels.
        grid: patches along an edge; what is left of the pixels is cut off.
        merge: edge of the block of patches that becomes one feature.
    """

    edge: int
    grid: int
    merge: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Tile:
        """Read it from config.json.

        Raises:
            UnsupportedModelError: numbers that are none, or blocks that do not divide the patches.
        """
        vision = config.get("vision_config") or {}
        edge, patch = vision.get("image_size", 224), vision.get("patch_size", 32)
        merge = config.get("scale_factor", 2)
        if not all(type(n) is int and n >= 1 for n in (edge, patch, merge)) or patch > edge or edge // patch % merge:
            raise UnsupportedModelError(
                f"vision_config has image_size {edge!r} and patch_size {patch!r}, and scale_factor is {merge!r}; "
                "they must be whole numbers, and scale_factor must divide the patches along an edge."
            )
        return cls(edge, edge // patch, merge)

    @property
    def num_features(self) -> int:
        return (self.grid // self.merge) ** 2


@dataclass(frozen=True, kw_only=True)
class Idefics3Rule(PictureRule):
    """The ``MediaRule`` of ``Idefics3ForConditionalGeneration`` and of ``SmolVLMForConditionalGeneration``, which alone
    takes videos.

    A picture's ``numbers`` are its (rows, columns) of tiles, without the overview; (0, 0) where that is alone. A
    video's ``times`` are those of its frames, then its duration.

    Attributes:
        fake_token_id: stands before each tile's tag, and at the end.
    """

    tile: Tile
    fake_token_id: int
    global_token_id: int
    video_settings: Mapping[str, Any]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        tile = Tile.from_hf(config)
        name, settings = read_settings(
            processor, _PROCESSORS, default="Idefics3ImageProcessor", family="Idefics3 and SmolVLM"
        )
        if settings["max_image_size"] != {"longest_edge": tile.edge}:
            raise UnsupportedModelError(
                f"The {name} config has max_image_size {settings['max_image_size']!r}; the vision tower takes tiles of "
                f"{tile.edge} x {tile.edge} pixels, which is {{'longest_edge': {tile.edge}}}."
            )
        if settings["image_seq_len"] not in (None, tile.num_features):
            raise UnsupportedModelError(
                f"The processor's image_seq_len is {settings['image_seq_len']!r}; the tower makes {tile.num_features} "
                "features of a tile."
            )
        fake, start = (tokenizer.convert_tokens_to_ids(token) for token in (_FAKE, _GLOBAL))
        if fake is None or start is None:
            raise UnsupportedModelError(f"The tokenizer lacks {_FAKE!r} or {_GLOBAL!r}, which stand before tiles.")
        with checkpoint_settings(name):
            norm = read_norm(settings)
            read_resample(settings)
            read_longest_size(settings)
        takes_videos = config.get("model_type") == "smolvlm"
        video_settings = _read_video_settings(processor, settings) if takes_videos else {}
        mark, token_id = read_image_token(config, processor, tokenizer)
        video_id = tokenizer.convert_tokens_to_ids(_VIDEO)
        return cls(
            tile=tile,
            fake_token_id=fake,
            global_token_id=start,
            video_mark=Placeholder(_VIDEO, video_id, re.escape(_VIDEO)) if takes_videos else None,
            video_settings=video_settings,
            mark=mark,
            image_token_id=token_id,
            norm=norm,
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=_FIXED, others=self.video_settings)
        edge = self.tile.edge
        ops: list[PixelOp] = []
        with request_settings():
            resample, size = read_resample(settings), read_longest_size(settings)
        if settings["do_resize"]:
            ops.append(Resize(*_resized(width, height, size), resample))
        cols = rows = 1
        if settings["do_image_splitting"]:
            cols, rows = _tile_grid(*output_size(ops, width, height), edge)
            ops.append(Resize(cols * edge, rows * edge, resample))
        views: tuple[View, ...] = (View((*ops, Resize(edge, edge, resample)), edge, edge),)
        if rows * cols > 1:
            views = (View(tuple(ops), edge, edge, rows, cols), *views)
        else:
            rows = cols = 0
        output_size(views[-1].ops, width, height)
        num_tiles = rows * cols + 1
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=views),
            num_features=num_tiles * self.tile.num_features,
            num_patches=num_tiles * self.tile.grid**2,
            numbers=(rows, cols),
        )

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        self.placeholder("video")
        settings = with_options(self.video_settings, options, fixed=_FIXED, others=self.settings)
        clip = sample(clip, settings, options, lambda clip: _sampled(clip, settings))
        edge = self.tile.edge
        ops: tuple[PixelOp, ...] = ()
        if settings["do_resize"]:
            with request_settings():
                resample, size = read_resample(settings), read_longest_size(settings)
            ops = (Resize(*_resized(clip.width, clip.height, size), resample), Resize(edge, edge, resample))
            output_size(ops, clip.width, clip.height)
        elif (clip.width, clip.height) != (edge, edge):
            raise RequestError(
                f"Without do_resize, videos must have {edge} x {edge} pixels, not {clip.width} x {clip.height}.",
                param="multi_modal_data",
            )
        num_frames = len(clip.frames)
        # Frames whose speed nobody told have no duration either; Hugging Face then takes the last one's time.
        times = (*clip.times, clip.times[-1] if clip.fps is None else clip.duration)
        if not max(times) <= _LONGEST_S:
            raise RequestError(
                f"At {clip.fps} frames per second this video takes {max(times):.3g} s, longer than this model's prompt "
                "can say; give its speed as it is.",
                param="multi_modal_data",
            )
        return MediaLayout(
            plan=PixelPlan(clip.width, clip.height, (View(ops, edge, edge),), clip.frames),
            num_features=num_frames * self.tile.num_features,
            num_patches=num_frames * self.tile.grid**2,
            times=times,
        )

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Of a picture: features of an overview alone; with ``image_sizes``, (height, width) each, of all tiles and the
        overview. Of a video: those of its frames, which then count as 24 a second."""
        self.placeholder(modality)  # refuses videos where there are none
        if modality == "video":
            return self._video_features(num_features, extras)
        size = given_size(extras)
        rows, cols = (0, 0) if size is None else self.layout(modality, *size, 1, {}).numbers
        expected = (rows * cols + 1) * self.tile.num_features
        if num_features != expected:
            raise RequestError(
                f"An image embedding has {num_features} rows, expected {expected}: {self.tile.num_features} for each "
                f"of {rows} x {cols} tiles and the overview. For pictures in tiles, give their (height, width) as "
                "'image_sizes' beside 'image_embeds'.",
                param="multi_modal_data",
            )
        return given_features(num_features, (rows, cols))

    def _video_features(self, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        count, rest = divmod(num_features, self.tile.num_features)
        if extras or rest:
            raise RequestError(
                f"A video's embedding has {num_features} rows{' and more beside them' * bool(extras)}; in this model "
                f"it comes alone, with {self.tile.num_features} for each frame.",
                param="multi_modal_data",
            )
        times = tuple(i / DEFAULT_FPS for i in range(count))
        return msgspec.structs.replace(given_features(num_features), times=(*times, times[-1]))

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        fake, features = TokenRun(self.fake_token_id), TokenRun(self.image_token_id, self.tile.num_features, True)
        whole = (fake, TokenRun(self.global_token_id), features, fake)
        runs: list[TokenRun | str] = []
        if modality == "video":
            *times, duration = layout.times
            intro = (
                f"You are provided the following series of {in_words(len(times))} frames from a "
                f"{timedelta(seconds=int(duration))} [H:MM:SS] video.\n"
            )
            for time in times:
                runs += (f"{intro}\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:", *whole)
                intro = ""
            return [*runs, "\n\n"]
        rows, cols = layout.numbers
        for row in range(1, rows + 1):
            for col in range(1, cols + 1):
                runs += (fake, f"<row_{row}_col_{col}>", features)  # a token, up to six rows and columns
            runs.append("\n" if row < rows else "\n\n")
        return [*runs, *whole]


def in_words(count: int) -> str:
    """A number below a million in English: "one thousand, two hundred and twenty-one"."""
    if count < 20:
        return _SMALL[count]
    if count < 100:
        return _TENS[count // 10] + (f"-{_SMALL[count % 10]}" if count % 10 else "")
    size, name = (100, "hundred") if count < 1000 else (1000, "thousand")
    rest = count % size
    joint = " and " if rest < 100 else ", "
    return f"{in_words(count // size)} {name}" + (f"{joint}{in_words(rest)}" if rest else "")


def _sampled(clip: Clip, settings: Mapping[str, Any]) -> Sequence[int]:
    """The frames that Hugging Face's video processor samples: ``fps`` of them a second, at most ``num_frames``, without
    the first and last second of a long video. ``ValueError`` where one of the two is unknown."""
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


def _read_video_settings(processor: Mapping[str, Any], pictures: Mapping[str, Any]) -> dict[str, Any]:
    """The video processor's settings, what ``video_sampling`` says spelled as ``num_frames``, ``fps`` and ``size``.

    Raises:
        UnsupportedModelError: a setting that is not implemented, or not that of pictures where the tower takes one.
    """
    name, settings = read_video_settings(
        processor, _VIDEO_PROCESSORS, default="SmolVLMVideoProcessor", family="SmolVLM"
    )
    sampling = settings.pop("video_sampling")
    with checkpoint_settings(name):
        if sampling is not None:
            if not isinstance(sampling, Mapping) or set(sampling) != {"fps", "max_frames", "video_size"}:
                raise ValueError(f"video_sampling is {sampling!r}; it must have fps, max_frames and video_size.")
            settings |= {"num_frames": sampling["max_frames"], "fps": sampling["fps"]}
            if (processor.get("video_processor") or processor).get("size") is None:
                settings["size"] = sampling["video_size"]
        read_resample(settings)
        read_longest_size(settings)
        if read_norm(settings) != read_norm(pictures) or settings["max_image_size"] != pictures["max_image_size"]:
            raise ValueError("its max_image_size or its normalisation is not that of pictures; the tower takes one.")
    return settings


def _resized(width: int, height: int, size: Mapping[str, int]) -> tuple[int, int]:
    """(width, height) after the first resize: the long edge as given, the short one even, both within 4096.

    Source: HF ``get_resize_output_image_size``.
    """
    if "longest_edge" not in size:
        return size["width"], size["height"]
    edge, aspect = size["longest_edge"], width / height
    if width >= height:
        width, height = edge, max(1, _even(int(edge / aspect)))
    else:
        width, height = max(1, _even(int(edge * aspect))), edge
    aspect = width / height
    if width >= height and width > _LONGEST_EDGE:
        width, height = _LONGEST_EDGE, max(1, int(_LONGEST_EDGE / aspect))
    elif height > width and height > _LONGEST_EDGE:
        width, height = max(1, int(_LONGEST_EDGE * aspect)), _LONGEST_EDGE
    return width, height


def _even(length: int) -> int:
    return length + length % 2


def _tile_grid(width: int, height: int, edge: int) -> tuple[int, int]:
    """(columns, rows) of tiles: the long side in whole tiles, then the short one that keeps its ratio, in whole tiles.

    Source: HF ``resize_for_vision_encoder``.
    """
    aspect = width / height
    if width >= height:
        cols = math.ceil(width / edge)
        return cols, math.ceil(int(cols * edge / aspect) / edge)
    rows = math.ceil(height / edge)
    return math.ceil(int(rows * edge * aspect) / edge), rows
