"""MiniCPM-V's pictures: an overview of each, and slices of it on the grid nearest to its shape.

Source: the ``MiniCPMVImageProcessor`` and ``MiniCPMVProcessor`` of the checkpoint openbmb/MiniCPM-V-2_6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from opsin.errors import RequestError
from opsin.models.picture_rule import PictureRule, given_features
from opsin.models.picture_settings import (
    check_built,
    checkpoint_settings,
    per_channel,
    read_count,
    read_settings,
    request_settings,
    with_options,
)
from opsin.models.placeholders import plain_mark, token_ids
from opsin.models.rule import PixelNorm, TokenIds, TokenRun
from opsin.models.slicing import nearest_grid, num_areas, overview, slice_grid, slices
from opsin.types import Clip, MediaLayout, Modality, PixelPlan, View

_IMAGE, _VIDEO = "(<image>./</image>)", "(<video>./</video>)"
_MOST_SLICES = 256
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
        with checkpoint_settings(name):
            for again, key in _SAVED_AGAIN.items():
                if processor.get(again, settings[key]) != settings[key]:
                    raise ValueError(f"{again} is {processor[again]!r}, but {key} is {settings[key]!r}.")
            patch_size = (config.get("vision_config") or {"patch_size": 14}).get("patch_size", 16)
            num_queries = config.get("query_num") or 64
            check_built(settings, slice_mode=True, image_feature_size=num_queries, patch_size=patch_size)
            read_count(settings, "max_slice_nums", _MOST_SLICES)
            norm = PixelNorm(1 / 255, per_channel("norm_mean", settings), per_channel("norm_std", settings))
        image_id, *tags = token_ids(tokenizer, settings["unk"], *(settings[tag.name] for tag in fields(Tags)))
        return cls(
            tags=Tags(*tags),
            num_queries=num_queries,
            patch_size=patch_size,
            scale=settings["scale_resolution"],
            mark=plain_mark(_IMAGE, None),
            video_mark=plain_mark(_VIDEO, None),
            image_token_id=image_id,
            norm=norm,
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        settings = with_options(self.settings, options, fixed=_FIXED)
        with request_settings():
            max_slices = read_count(settings, "max_slice_nums", _MOST_SLICES)
        size = (width, height)
        grid = slice_grid(size, self.scale, max_slices)
        views = [overview(size, self.scale, self.patch_size, enlarge=grid is None)]
        if grid is not None:
            views.append(slices(size, grid, self.scale, self.patch_size))
        return self._layout(width, height, views, numbers=(*(grid or (0, 0)), int(settings["use_image_id"])))

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        """One overview a frame. ``max_slice_nums`` and ``use_image_id`` are for the pictures of the same prompt."""
        with_options(self.settings, options, fixed=_FIXED)
        view = overview((clip.width, clip.height), self.scale, self.patch_size, enlarge=True)
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
        most = num_areas(size, self.scale) + 1
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
