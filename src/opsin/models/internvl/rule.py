"""InternVL's pictures: square tiles on the grid of the nearest aspect ratio, and the whole picture as one more; of a
video, each frame is one tile.

Source: Hugging Face ``InternVLProcessor`` with ``GotOcr2ImageProcessor`` and ``InternVLVideoProcessor``;
arXiv:2404.16821.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from opsin.errors import UnsupportedModelError
from opsin.models.picture_rule import images_only
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    check_built,
    check_pixels,
    checkpoint_settings,
    read_resample,
    read_settings,
    request_settings,
    with_options,
)
from opsin.models.placeholders import agreed_id, plain_mark, token_ids
from opsin.models.rule import TokenIds, TokenRun
from opsin.models.tiles import Tile, TileRule, grids
from opsin.models.videos import VIDEO_PIXELS, check_enough, check_video_pixels, read_video_settings, sample, spaced
from opsin.types import Clip, MediaLayout, Modality, PixelPlan, Resize, View

_IMAGE_TOKEN, _START_TOKEN, _END_TOKEN, _VIDEO_TOKEN = "<IMG_CONTEXT>", "<img>", "</img>", "<video>"
_MOST_TILES = 256
_FIXED = frozenset({"size", "default_to_square"})
_PROCESSORS: dict[str, dict[str, Any]] = {
    "GotOcr2ImageProcessor": {
        **CLIP_PIXELS,
        "default_to_square": True,
        "size": {"height": 384, "width": 384},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 12,
    }
}
_VIDEO_PROCESSORS: dict[str, dict[str, Any]] = {
    "InternVLVideoProcessor": {
        **VIDEO_PIXELS,
        "size": {"height": 384, "width": 384},
        "initial_shift": True,
    }
}


@dataclass(frozen=True, kw_only=True)
class InternVLRule(TileRule):
    """The ``MediaRule`` of ``InternVLForConditionalGeneration``. The features of a picture, and those of each frame of
    a video, stand between two tags."""

    start_token_id: int
    end_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        tile = read_tile(config)
        name, settings = read_settings(processor, _PROCESSORS, default="GotOcr2ImageProcessor", family="InternVL")
        settings["crop_to_patches"] = True  # InternVLProcessor asks for it, whatever the config says
        seq_length = {"image_seq_length": processor.get("image_seq_length")}
        with checkpoint_settings(name):
            check_built(settings | seq_length, size=tile.size, image_seq_length=tile.num_features)
        image_id, start_id, end_id = token_ids(tokenizer, _IMAGE_TOKEN, _START_TOKEN, _END_TOKEN)
        agreed_id(tokenizer, _IMAGE_TOKEN, config, "image_token_id", 151667)  # InternVLConfig's default
        video_name, video_settings = read_video_settings(
            processor, _VIDEO_PROCESSORS, default="InternVLVideoProcessor", family="InternVL"
        )
        check_video_pixels(video_name, video_settings, settings, "size")
        video_id = tokenizer.convert_tokens_to_ids(_VIDEO_TOKEN)
        return cls(
            tile=tile,
            video_settings=video_settings,
            start_token_id=start_id,
            end_token_id=end_id,
            mark=plain_mark(_IMAGE_TOKEN, image_id),
            video_mark=None if video_id is None else plain_mark(_VIDEO_TOKEN, video_id),
            image_token_id=image_id,
            norm=check_pixels(name, settings, read_resample, _tile_bounds),
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=_FIXED, others=self.video_settings)
        edge = self.tile.edge
        with request_settings():
            (least, most), resample = _tile_bounds(settings), read_resample(settings)
        ops = (Resize(edge, edge, resample),)
        if settings["crop_to_patches"] and most > 1:  # resizes even without do_resize, as Hugging Face does
            views = (self.whole_view(ops, width, height),)
            cols, rows = tile_grid(width, height, edge, least, most)
            if cols * rows > 1:
                ops = (Resize(cols * edge, rows * edge, resample),)
                views = (View(ops, height=edge, width=edge, rows=rows, cols=cols), *views)
        else:
            views = (self.whole_view(ops if settings["do_resize"] else (), width, height),)
        return self.tiled(PixelPlan(width=width, height=height, views=views))

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        settings = with_options(self.video_settings, options, fixed=_FIXED, others=self.settings)
        clip = sample(clip, settings, options, lambda clip: _sampled(clip, settings))
        edge = self.tile.edge
        with request_settings():
            ops = (Resize(edge, edge, read_resample(settings)),) if settings["do_resize"] else ()
        return self.framed(clip, ops)

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        if modality == "image":
            return self._tagged(layout.num_features)
        num_frames = layout.num_features // self.tile.num_features
        captions = ["Frame1: ", *(f"\nFrame{i}: " for i in range(2, num_frames + 1))]
        return [part for caption in captions for part in (caption, *self._tagged(self.tile.num_features))]

    def _tagged(self, count: int) -> list[TokenRun]:
        features = TokenRun(self.image_token_id, count, is_feature=True)
        return [TokenRun(self.start_token_id), features, TokenRun(self.end_token_id)]


def tile_grid(width: int, height: int, edge: int, least: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the grid of ``least`` to ``most`` tiles whose aspect ratio is nearest to the picture's.

    Of grids that are equally near, a larger one is taken while the picture has more than half of its pixels.
    """
    aspect, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for cols, rows in grids(range(least, most + 1)):
        distance = abs(aspect - cols / rows)
        if distance < best_distance or (distance == best_distance and area > 0.5 * edge * edge * cols * rows):
            best, best_distance = (cols, rows), distance
    return best


def _sampled(clip: Clip, settings: Mapping[str, Any]) -> Sequence[int]:
    """The frames that Hugging Face's video processor samples, each from the middle of its share by default.
    ``ValueError`` where there are too few."""
    total, count, shift = clip.num_frames, settings["num_frames"], settings["initial_shift"]
    if count is None and settings["fps"] is not None:
        assert clip.fps is not None
        count = int(total / clip.fps * settings["fps"])
    if count is None:
        return range(total)
    check_enough(clip, count)
    return spaced(total, count, start=total / count / 2 if shift is True else float(shift))


def _tile_bounds(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(min_patches, max_patches). ``ValueError`` where they are not counts, or more than is sane."""
    least, most = settings["min_patches"], settings["max_patches"]
    if type(least) is not int or type(most) is not int or not 1 <= least <= most <= _MOST_TILES:
        raise ValueError(
            f"min_patches is {least!r} and max_patches {most!r}; they must be whole numbers, 1 <= min_patches <= "
            f"max_patches <= {_MOST_TILES}."
        )
    return least, most


def read_tile(config: Mapping[str, Any]) -> Tile:
    """What config.json says of a tile.

    Raises:
        UnsupportedModelError: a shape that is not square, or does not divide.
    """
    vision = config.get("vision_config") or {}
    edge, patch_size = _square(vision, "image_size", 448), _square(vision, "patch_size", 14)
    ratio = config.get("downsample_ratio")
    ratio = 0.5 if ratio is None else ratio
    merge = round(1 / ratio) if ratio in (1, 0.5, 0.25) else 0
    if merge == 0 or edge % (patch_size * merge):
        raise UnsupportedModelError(
            f"downsample_ratio is {ratio!r} for tiles of {edge} and patches of {patch_size} pixels; "
            "implemented are 1, 0.5 and 0.25 where they divide the tile."
        )
    return Tile(edge, patch_size, merge)


def _square(vision: Mapping[str, Any], name: str, default: int) -> int:
    value = vision.get(name)
    value = default if value is None else value
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or not all(type(side) is int and side >= 1 for side in sides):
        raise UnsupportedModelError(f"vision_config.{name} is {value!r}; only squares are implemented.")
    return sides.pop()
