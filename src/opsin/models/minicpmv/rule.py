"""MiniCPM-V's pictures: an overview of each, and slices of it on the grid nearest to its shape.

Source: the ``MiniCPMVImageProcessor`` and ``MiniCPMVProcessor`` of the checkpoint openbmb/MiniCPM-V-2_6; slicing after
arXiv:2403.11703.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.media.ops import output_size
from opsin.models.picture_rule import PictureRule, given_features
from opsin.models.pictures import checkpoint_settings, per_channel, read_settings, request_settings, with_options
from opsin.models.rule import PixelNorm, Placeholder, TokenIds, TokenRun
from opsin.types import Clip, MediaLayout, Modality, PixelPlan, Resize, View

Size = tuple[int, int]
"""(width, height) in pixels, or (columns, rows) in slices."""

_IMAGE, _VIDEO = "(<image>./</image>)", "(<video>./</video>)"
_MOST_SLICES = 256
_MOST_STRETCH = 8  # a slice is some scale_resolution squared; of a line, one patch high, it could be any number of them
_TAGS = ("im_id_start", "im_id_end", "im_start", "im_end", "slice_start", "slice_end")
_PROCESSORS: dict[str, dict[str, Any]] = {
    "MiniCPMVImageProcessor": {
        "max_slice_nums": 9,
        "scale_resolution": 448,
        "patch_size": 14,
        "use_image_id": False,
        "image_feature_size": 64,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "im_id_start": "<image_id>",
        "im_id_end": "</image_id>",
        "slice_mode": True,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": 2.0,
    }
}
_SAVED_AGAIN = {  # the processor's attributes, which its ``save_pretrained`` writes beside the keys they were read from
    "im_start_token": "im_start",
    "im_end_token": "im_end",
    "slice_start_token": "slice_start",
    "slice_end_token": "slice_end",
    "unk_token": "unk",
    "mean": "norm_mean",
    "std": "norm_std",
}
_FIXED = frozenset(_PROCESSORS["MiniCPMVImageProcessor"]) - {"max_slice_nums", "use_image_id"}


@dataclass(frozen=True, slots=True)
class Tags:
    """Ids of the tokens around a picture's number, its overview and each of its slices."""

    im_id_start: int
    im_id_end: int
    im_start: int
    im_end: int
    slice_start: int
    slice_end: int


@dataclass(frozen=True, kw_only=True)
class MiniCPMVRule(PictureRule):
    """The ``MediaRule`` of ``MiniCPMV``, version 2.6.

    A picture's tiles are its overview, then its slices row by row; each becomes ``num_queries`` features. A layout's
    ``numbers`` are the grid (columns, rows) of slices, (0, 0) where there are none, and whether the prompt tells the
    picture's number. A video's frames are overviews alone, without numbers, as vLLM has them.
    """

    tags: Tags
    num_queries: int
    patch_size: int
    scale: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        known = {key: value for key, value in processor.items() if key not in _SAVED_AGAIN and key != "auto_map"}
        name, settings = read_settings(known, _PROCESSORS, default="MiniCPMVImageProcessor", family="MiniCPM-V")
        for again, key in _SAVED_AGAIN.items():
            if processor.get(again, settings[key]) != settings[key]:
                raise UnsupportedModelError(
                    f"The {name} config has {again} {processor[again]!r}, but {key} is {settings[key]!r}."
                )
        if settings["slice_mode"] is not True:
            raise UnsupportedModelError(f"slice_mode is {settings['slice_mode']!r}; only true is implemented.")
        vision = config.get("vision_config") or {"patch_size": 14}
        for key, built in (
            ("image_feature_size", config.get("query_num") or 64),
            ("patch_size", vision.get("patch_size", 16)),
        ):
            if settings[key] != built:
                raise UnsupportedModelError(
                    f"The {name} config has {key} {settings[key]}, but config.json has {built}."
                )
        with checkpoint_settings(name):
            _max_slices(settings)
            norm = PixelNorm(1 / 255, per_channel("norm_mean", settings), per_channel("norm_std", settings))
        return cls(
            tags=Tags(**{tag: _token_id(tokenizer, settings[tag]) for tag in _TAGS}),
            num_queries=settings["image_feature_size"],
            patch_size=settings["patch_size"],
            scale=settings["scale_resolution"],
            mark=Placeholder(_IMAGE, None, re.escape(_IMAGE)),
            video_mark=Placeholder(_VIDEO, None, re.escape(_VIDEO)),
            image_token_id=_token_id(tokenizer, settings["unk"]),
            norm=norm,
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        settings = with_options(self.settings, options, fixed=_FIXED)
        with request_settings():
            max_slices = _max_slices(settings)
        grid = slice_grid((width, height), self.scale, max_slices)
        views = [self._view(best_size(width, height, self.scale, self.patch_size, enlarge=grid is None))]
        if grid is not None:
            views.append(self._view(self._slice_size(width, height, grid), *grid))
        return self._layout(width, height, views, numbers=(*(grid or (0, 0)), int(settings["use_image_id"])))

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        """One overview a frame. ``max_slice_nums`` and ``use_image_id`` are for the pictures of the same prompt."""
        with_options(self.settings, options, fixed=_FIXED)
        view = self._view(best_size(clip.width, clip.height, self.scale, self.patch_size, enlarge=True))
        return self._layout(clip.width, clip.height, [view], clip.frames)

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Features as the model makes them, slice after slice, beside their picture's (width, height). Their number
        tells the limit on slices under which they were made.
        """
        if modality != "image" or set(extras) != {"image_sizes"}:
            raise RequestError(
                "Image embeddings of this model come with their pictures' sizes, which tell how they are sliced: "
                "{'image_embeds': tensor, 'image_sizes' or 'image_size_list': [(width, height)]}, and it takes no "
                "video embeddings.",
                param="multi_modal_data",
            )
        width, height = size = extras["image_sizes"]
        num_slices = num_features // self.num_queries - 1
        most = _num_areas(size, self.scale) + 1
        if num_features % self.num_queries or not (num_slices == 0 or 2 <= num_slices <= most > 2):
            raise RequestError(
                f"A picture of width {width} and height {height} has {num_features} features; this model makes "
                f"{self.num_queries} of it, and {self.num_queries} of each slice, of which there are "
                f"{f'none or 2 to {most}' if most > 2 else 'none'}.",
                param="multi_modal_data",
            )
        grid = nearest_grid(size, (num_slices,)) if num_slices else (0, 0)
        return given_features(num_features, (*grid, int(self.settings["use_image_id"])))

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        tags = self.tags
        features = TokenRun(self.image_token_id, self.num_queries, is_feature=True)
        whole = [TokenRun(tags.im_start), features, TokenRun(tags.im_end)]
        if modality == "video":
            return whole * (layout.num_features // self.num_queries)
        cols, rows, is_numbered = layout.numbers
        runs: list[TokenRun | str] = list(whole)
        if is_numbered:
            runs = [TokenRun(tags.im_id_start), str(index - 1), TokenRun(tags.im_id_end), *whole]
        row = [TokenRun(tags.slice_start), features, TokenRun(tags.slice_end)] * cols
        for i in range(rows):
            runs += row if i == 0 else ["\n", *row]
        return runs

    def _layout(
        self,
        width: int,
        height: int,
        views: Sequence[View],
        frames: tuple[int, ...] = (0,),
        numbers: tuple[int, ...] = (),
    ) -> MediaLayout:
        tiles = sum(view.rows * view.cols for view in views) * len(frames)
        area = sum(view.rows * view.cols * view.height * view.width for view in views) * len(frames)
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=tuple(views), frames=frames),
            num_features=tiles * self.num_queries,
            num_patches=area // self.patch_size**2,
            numbers=numbers,
        )

    def _view(self, size: Size, cols: int = 1, rows: int = 1) -> View:
        """Tiles of ``size``.

        Raises:
            MediaError: the picture is so narrow that they would be far larger than usual.
        """
        width, height = size
        if width * height > _MOST_STRETCH * self.scale**2:
            raise MediaError(
                f"The picture is too narrow: a slice of it would be {width} x {height} pixels. Crop it, or pad it to a "
                "squarer shape.",
                code="image_too_small",
            )
        ops = (Resize(cols * width, rows * height, "bicubic"),)
        output_size(ops, width, height)
        return View(ops, height=height, width=width, rows=rows, cols=cols)

    def _slice_size(self, width: int, height: int, grid: Size) -> Size:
        """Of each slice: the picture is first thought of as rounded to whole ones."""
        cols, rows = grid
        part_width, part_height = _whole(width, cols) / cols, _whole(height, rows) / rows
        return best_size(part_width, part_height, self.scale, self.patch_size, enlarge=True)


def slice_grid(size: Size, scale: int, max_slices: int) -> Size | None:
    """(columns, rows) of the slices; None where the overview is enough.

    As many as the picture has areas of ``scale`` squared, one less or one more; the grid whose shape is nearest.
    """
    count = min(_num_areas(size, scale), max_slices)
    if count <= 1:
        return None
    return nearest_grid(size, [n for n in (count - 1, count, count + 1) if 1 < n <= max_slices])


def nearest_grid(size: Size, counts: Sequence[int]) -> Size:
    """Of the grids of ``counts`` slices, the one whose shape is nearest to the picture's; of equals, the first."""
    grids = [(cols, n // cols) for n in counts for cols in range(1, n + 1) if n % cols == 0]
    shape = math.log(size[0] / size[1])
    return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))


def _num_areas(size: Size, scale: int) -> int:
    return math.ceil(size[0] * size[1] / (scale * scale))


def best_size(width: float, height: float, scale: int, patch_size: int, *, enlarge: bool) -> Size:
    """(width, height) in whole patches, the shape kept: an area of about ``scale`` squared, or the picture's own where
    that is smaller and ``enlarge`` is false."""
    if enlarge or width * height > scale * scale:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)
    return _whole(width, patch_size), _whole(height, patch_size)


def _whole(length: float, unit: int) -> int:
    """The nearest multiple of ``unit``, at least one."""
    return max(round(length / unit) * unit, unit)


def _max_slices(settings: Mapping[str, Any]) -> int:
    """``ValueError`` where it is not a count, or more than is sane."""
    value = settings["max_slice_nums"]
    if type(value) is not int or not 1 <= value <= _MOST_SLICES:
        raise ValueError(f"max_slice_nums is {value!r}; it must be a whole number from 1 to {_MOST_SLICES}.")
    return value


def _token_id(tokenizer: TokenIds, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None:
        raise UnsupportedModelError(f"The tokenizer does not know {token!r}, which surrounds pictures in prompts.")
    return token_id
