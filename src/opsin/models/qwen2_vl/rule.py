"""Qwen2-VL's pictures: each at its own resolution, in whole merge units; M-RoPE positions.

Source: Hugging Face ``Qwen2VLImageProcessor`` and ``Qwen2VLModel.get_rope_index``; arXiv:2409.12191. Qwen2.5-VL
differs in its tower alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

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
from opsin.types import MediaItem, MediaLayout, Modality, PixelPlan, Resize, View

_MAX_ASPECT_RATIO = 200
_IMAGE_TOKEN = "<|image_pad|>"
_GEOMETRY = ("patch_size", "merge_size", "temporal_patch_size")
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


@dataclass(frozen=True, kw_only=True)
class Qwen2VLRule(PictureRule):
    """The ``MediaRule`` of ``Qwen2VLForConditionalGeneration`` and ``Qwen2_5_VLForConditionalGeneration``.

    A layout's ``numbers`` are the grid (frames, rows, columns) in patches; ``merge_size`` squared of them make one
    feature.
    """

    patch_size: int
    merge_size: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        name, settings = read_settings(
            processor, _PROCESSORS, default="Qwen2VLImageProcessor", family="Qwen2-VL and Qwen2.5-VL"
        )
        vision = config.get("vision_config") or {}
        built = tuple(vision.get(key, default) for key, default in _TOWER_GEOMETRY)
        given = tuple(settings[key] for key in _GEOMETRY)
        if built != given:
            raise UnsupportedModelError(f"The {name} config has {_GEOMETRY} = {given}, but vision_config has {built}.")
        token_id = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
        if token_id is None or token_id != config.get("image_token_id", token_id):
            raise UnsupportedModelError(
                f"The tokenizer's id of {_IMAGE_TOKEN!r} is {token_id}; config.json's image_token_id is "
                f"{config.get('image_token_id')}. They must be the same."
            )
        with checkpoint_settings(name):
            settings["size"] = _pixel_bounds(settings)
            norm = read_norm(settings)
            read_resample(settings)
        settings["min_pixels"] = settings["max_pixels"] = None  # said by size from here on, which options may override
        # Prompts hold the pad between two tags that stay; the pad alone is what expands.
        text = f"<|vision_start|>{_IMAGE_TOKEN}<|vision_end|>"
        return cls(
            patch_size=settings["patch_size"],
            merge_size=settings["merge_size"],
            mark=Placeholder(text, token_id, re.escape(_IMAGE_TOKEN)),
            image_token_id=token_id,
            norm=norm,
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=frozenset(_GEOMETRY))
        unit = self.patch_size * self.merge_size
        with request_settings():
            bounds, resample = _pixel_bounds(settings), read_resample(settings)
        ops: tuple[Resize, ...] = ()
        if settings["do_resize"]:
            size = smart_resize(width, height, unit, bounds["shortest_edge"], bounds["longest_edge"])
            ops = (Resize(*size, resample),)
        elif width % unit or height % unit:
            raise RequestError(
                f"Without do_resize, sides must be multiples of {unit}, not {width} x {height}.",
                param="multi_modal_data",
            )
        made_width, made_height = output_size(ops, width, height)
        rows, cols = made_height // self.patch_size, made_width // self.patch_size
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=(View(ops, height=made_height, width=made_width),)),
            num_features=rows * cols // self.merge_size**2,
            num_patches=rows * cols,
            numbers=(1, rows, cols),
        )

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        images_only(modality)
        if set(extras) != {"image_grid_thw"}:
            raise RequestError(
                "Image embeddings of this model come with their grids, since positions depend on them: "
                "{'image_embeds': tensor, 'image_grid_thw': [(1, rows, columns)]}, in patches.",
                param="multi_modal_data",
            )
        frames, rows, cols = grid = extras["image_grid_thw"]
        merge = self.merge_size
        if frames != 1 or rows % merge or cols % merge or rows * cols != num_features * merge**2:
            raise RequestError(
                f"image_grid_thw is {grid} for {num_features} features; it must be 1 and two multiples of {merge} "
                f"whose product is {merge**2} times the number of features.",
                param="multi_modal_data",
            )
        return given_features(num_features, tuple(grid))

    def positions(self, token_ids: Sequence[int], items: Sequence[MediaItem]) -> Positions | None:
        """Text counts on all three axes; a picture counts its rows and columns, and takes as many as the longer side.

        Linear in the prompt.
        """
        if not items:
            return None
        parts: list[np.ndarray] = []
        done = position = 0  # the next token, and its position
        for item in items:
            start = token_ids.index(self.image_token_id, done)
            _, rows, cols = (size // self.merge_size for size in item.layout.numbers)
            parts.append(_counted(position, start - done))
            position += start - done
            parts.append(np.indices((1, rows, cols)).reshape(3, -1) + position)
            position += max(rows, cols)
            done = start + rows * cols
        parts.append(_counted(position, len(token_ids) - done))
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


def _pixel_bounds(settings: Mapping[str, Any]) -> dict[str, int]:
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


def _counted(position: int, count: int) -> np.ndarray:
    return np.tile(np.arange(position, position + count), (3, 1))
