"""The pictures of Idefics3 and SmolVLM: tiles of the whole, each behind a tag of its row and column; an overview.
SmolVLM's videos: frames, each behind the time when it was.

Source: Hugging Face ``Idefics3ImageProcessor`` and ``SmolVLMImageProcessor`` (Pillow-backed), ``Idefics3Processor``,
``SmolVLMVideoProcessor`` and ``SmolVLMProcessor``; arXiv:2408.12637 and arXiv:2504.05299.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import msgspec

from opsin.errors import RequestError, UnsupportedModelError
from opsin.media.ops import output_size
from opsin.models.numerals import in_words
from opsin.models.picture_rule import given_features, given_size, images_only
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    SIGLIP_NORM,
    check_built,
    check_pixels,
    checkpoint_settings,
    read_longest_size,
    read_resample,
    read_settings,
    request_settings,
    with_options,
)
from opsin.models.placeholders import plain_mark, read_image_token, token_ids
from opsin.models.rule import TokenIds, TokenRun
from opsin.models.tiles import Tile, TileRule, covering_grid, with_long_side
from opsin.models.videos import VIDEO_PIXELS, check_video_pixels, read_video_settings, sample, without_ends
from opsin.types import DEFAULT_FPS, Clip, MediaLayout, Modality, PixelOp, PixelPlan, Resize, View

_FAKE, _GLOBAL, _VIDEO = "<fake_token_around_image>", "<global-img>", "<video>"
_LONGEST_EDGE = 4096  # whatever the settings ask for
_LONGEST_S = 10**9
_SHARED: dict[str, Any] = {  # by the processors of pictures and of videos
    **SIGLIP_NORM,
    "resample": 1,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_pad": True,  # tiles have one size, so there is nothing to fill up
    "video_sampling": None,
}
_DEFAULTS: dict[str, Any] = {
    **CLIP_PIXELS,
    **_SHARED,
    "do_image_splitting": True,
    "image_seq_len": None,
    "return_row_col_info": None,
}
_PROCESSORS = {"Idefics3ImageProcessor": _DEFAULTS, "SmolVLMImageProcessor": _DEFAULTS}
_VIDEO_PROCESSORS = {"SmolVLMVideoProcessor": {**VIDEO_PIXELS, **_SHARED}}
_FIXED = frozenset({"max_image_size", "image_seq_len", "video_sampling"})


@dataclass(frozen=True, kw_only=True)
class Idefics3Rule(TileRule):
    """The ``MediaRule`` of ``Idefics3ForConditionalGeneration`` and of ``SmolVLMForConditionalGeneration``, which alone
    takes videos.

    A picture's ``numbers`` are its (rows, columns) of tiles, without the overview; (0, 0) where that is alone. A
    video's ``times`` are those of its frames, then its duration.

    Attributes:
        fake_token_id: stands before each tile's tag, and at the end.
    """

    fake_token_id: int
    global_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        tile = read_tile(config)
        name, settings = read_settings(processor, _PROCESSORS, default="Idefics3ImageProcessor", family="Idefics3")
        with checkpoint_settings(name):
            check_built(settings, max_image_size={"longest_edge": tile.edge}, image_seq_len=tile.num_features)
        fake_id, global_id = token_ids(tokenizer, _FAKE, _GLOBAL)
        takes_videos = config.get("model_type") == "smolvlm"
        mark, token_id = read_image_token(config, processor, tokenizer)
        return cls(
            tile=tile,
            fake_token_id=fake_id,
            global_token_id=global_id,
            video_mark=plain_mark(_VIDEO, tokenizer.convert_tokens_to_ids(_VIDEO)) if takes_videos else None,
            video_settings=_read_video_settings(processor, settings) if takes_videos else {},
            mark=mark,
            image_token_id=token_id,
            norm=check_pixels(name, settings, read_resample, read_longest_size),
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=_FIXED, others=self.video_settings)
        edge = self.tile.edge
        ops: tuple[PixelOp, ...] = ()
        with request_settings():
            resample, size = read_resample(settings), read_longest_size(settings)
        if settings["do_resize"]:
            ops = (Resize(*_resized(width, height, size), resample),)
        cols = rows = 1
        if settings["do_image_splitting"]:
            cols, rows = covering_grid(*output_size(ops, width, height), edge)
            ops = (*ops, Resize(cols * edge, rows * edge, resample))
        whole = self.whole_view((*ops, Resize(edge, edge, resample)), width, height)
        if rows * cols == 1:
            return self.tiled(PixelPlan(width, height, (whole,)), numbers=(0, 0))
        return self.tiled(PixelPlan(width, height, (View(ops, edge, edge, rows, cols), whole)), numbers=(rows, cols))

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        self.placeholder("video")
        settings = with_options(self.video_settings, options, fixed=_FIXED, others=self.settings)
        clip = sample(clip, settings, options, lambda clip: without_ends(clip, settings))
        edge = self.tile.edge
        ops: tuple[PixelOp, ...] = ()
        if settings["do_resize"]:
            with request_settings():
                resample, size = read_resample(settings), read_longest_size(settings)
            ops = (Resize(*_resized(clip.width, clip.height, size), resample), Resize(edge, edge, resample))
        # Frames whose speed nobody told have no duration either; Hugging Face then takes the last one's time.
        times = (*clip.times, clip.times[-1] if clip.fps is None else clip.duration)
        if not max(times) <= _LONGEST_S:
            raise RequestError(
                f"At {clip.fps} frames per second this video takes {max(times):.3g} s, longer than this model's prompt "
                "can say; give its speed as it is.",
                param="multi_modal_data",
            )
        return self.framed(clip, ops, times)

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Of a picture: features of an overview alone; with ``image_sizes``, (height, width) each, of all tiles and the
        overview. Of a video: those of its frames, which then count as 24 a second."""
        if modality == "video":
            layout = super().embedding_layout(modality, num_features, extras)
            times = tuple(i / DEFAULT_FPS for i in range(num_features // self.tile.num_features))
            return msgspec.structs.replace(layout, times=(*times, times[-1]))
        size = given_size(extras)
        if size is not None:
            return self.sized_features(num_features, size)
        if num_features != self.tile.num_features:
            raise RequestError(
                f"An image embedding has {num_features} rows; an overview alone has {self.tile.num_features}. For "
                "pictures in tiles, give their (height, width) as 'image_sizes' beside 'image_embeds'.",
                param="multi_modal_data",
            )
        return given_features(num_features, (0, 0))

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


def read_tile(config: Mapping[str, Any]) -> Tile:
    """What config.json says of a tile.

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
    return Tile(edge, patch, merge)


def _read_video_settings(processor: Mapping[str, Any], pictures: Mapping[str, Any]) -> dict[str, Any]:
    """The video processor's settings, what ``video_sampling`` says spelled as ``num_frames``, ``fps`` and ``size``.

    Raises:
        UnsupportedModelError: a setting that is not implemented, or not that of pictures where the tower takes one.
    """
    name, settings = read_video_settings(
        processor, _VIDEO_PROCESSORS, default="SmolVLMVideoProcessor", family="SmolVLM"
    )
    sampling = settings.pop("video_sampling")
    if sampling is not None:
        if not isinstance(sampling, Mapping) or set(sampling) != {"fps", "max_frames", "video_size"}:
            raise UnsupportedModelError(
                f"The {name} config's video_sampling is {sampling!r}; it must have fps, max_frames and video_size."
            )
        settings |= {"num_frames": sampling["max_frames"], "fps": sampling["fps"]}
        if (processor.get("video_processor") or processor).get("size") is None:
            settings["size"] = sampling["video_size"]
    check_pixels(name, settings, read_longest_size)
    check_video_pixels(name, settings, pictures, "max_image_size")
    return settings


def _resized(width: int, height: int, size: Mapping[str, int]) -> tuple[int, int]:
    """(width, height) after the first resize: the long edge as given, the short one even, both within 4096.

    Source: HF ``get_resize_output_image_size``.
    """
    if "longest_edge" not in size:
        return size["width"], size["height"]
    made = with_long_side(size["longest_edge"], width / height, multiple=2)
    return made if max(made) <= _LONGEST_EDGE else with_long_side(_LONGEST_EDGE, made[0] / made[1])
