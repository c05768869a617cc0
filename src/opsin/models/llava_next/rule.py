"""LLaVA-NeXT's pictures: a squeezed overview, and tiles of the whole at the best of a few resolutions ("anyres").

Source: Hugging Face ``LlavaNextImageProcessor`` (Pillow-backed), ``LlavaNextProcessor`` and
``LlavaNextModel.pack_image_features``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

from opsin.errors import RequestError, UnsupportedModelError
from opsin.models.picture_rule import PictureRule, given_features, given_size, images_only
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    check_pixels,
    checkpoint_settings,
    read_resample,
    read_settings,
    read_size,
    request_settings,
    with_options,
)
from opsin.models.placeholders import read_image_token
from opsin.models.rule import TokenIds
from opsin.models.square_tower import read_square_tower
from opsin.types import MediaLayout, Modality, Pad, PixelPlan, Resize, View

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_PROCESSORS: dict[str, dict[str, Any]] = {
    "LlavaNextImageProcessor": {
        **CLIP_PIXELS,
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_pad": True,  # fills batches up with empty tiles, which never reach the tower
        "image_grid_pinpoints": _PINPOINTS,
        "aspect_ratio_setting": "anyres",
    }
}


@dataclass(frozen=True, kw_only=True)
class LlavaNextRule(PictureRule):
    """The ``MediaRule`` of ``LlavaNextForConditionalGeneration``; its class variables are what its kin has otherwise.

    A layout's tiles are the overview, then the mosaic row by row. Its ``numbers`` are the mosaic's (rows, columns) in
    tiles, then how many of its patch rows, and of its patch columns, are cut off at either end because they see
    padding. The features are the overview's patches, then the rest of the mosaic row by row, a newline after each row.

    Attributes:
        family: its name, for errors.
        processors: the picture processors it takes, as ``read_settings`` wants them; the first is the default.
        config_defaults: what an absent key of config.json says.
        fixed: settings that no request changes.
        image_size: edge of a tile, in pixels.
        pinpoints: the resolutions to choose from, as (height, width).
        video_settings: the video processor's, of kin that take videos.
    """

    family: ClassVar[str] = "LLaVA-NeXT"
    processors: ClassVar[Mapping[str, Mapping[str, Any]]] = _PROCESSORS
    config_defaults: ClassVar[Mapping[str, Any]] = {"image_grid_pinpoints": _PINPOINTS}
    fixed: ClassVar[frozenset[str]] = frozenset({"image_grid_pinpoints", "aspect_ratio_setting"})

    image_size: int
    patch_size: int
    pinpoints: tuple[tuple[int, int], ...]
    video_settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        config = {**cls.config_defaults, **{key: value for key, value in config.items() if value is not None}}
        tower = read_square_tower(config, family=cls.family)
        if tower.num_features != tower.num_patches:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy is {config.get('vision_feature_select_strategy', 'default')!r}; the "
                "mosaic needs exactly one feature per patch: 'default' with a CLIP tower, 'full' with a SigLIP tower."
            )
        name, settings = read_settings(processor, cls.processors, default=next(iter(cls.processors)), family=cls.family)
        if settings.get("aspect_ratio_setting", "anyres") != "anyres":
            raise UnsupportedModelError(
                f"aspect_ratio_setting is {settings['aspect_ratio_setting']!r}; only 'anyres' is implemented."
            )
        given, built = settings["image_grid_pinpoints"], config["image_grid_pinpoints"]
        if _pairs(given) != _pairs(built):
            raise UnsupportedModelError(
                f"The {name} config has image_grid_pinpoints {given}, but config.json has {built}."
            )
        with checkpoint_settings(name):
            pinpoints = _read_pinpoints(given, tower.image_size)
            _check_sizes(settings, tower.image_size)
        mark, token_id = read_image_token(config, processor, tokenizer)
        return cls(
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            pinpoints=pinpoints,
            mark=mark,
            image_token_id=token_id,
            norm=check_pixels(name, settings, read_resample),
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=self.fixed, others=self.video_settings)
        edge = self.image_size
        with request_settings():
            _check_sizes(settings, edge)
            resample = read_resample(settings)
        canvas_width, canvas_height = best_resolution(width, height, self.pinpoints)
        inner_width, inner_height = _fitted(width, height, canvas_width, canvas_height)
        left, top = (canvas_width - inner_width) // 2, (canvas_height - inner_height) // 2
        pad = Pad(left, top, canvas_width - inner_width - left, canvas_height - inner_height - top)
        rows, cols = canvas_height // edge, canvas_width // edge
        overview = View((Resize(edge, edge, resample),), edge, edge)
        mosaic = View((Resize(inner_width, inner_height, resample), pad), edge, edge, rows, cols)
        grid = edge // self.patch_size
        cut_rows, cut_cols = unpad(width, height, rows * grid, cols * grid)
        shown_rows, shown_cols = self.shown(rows * grid - 2 * cut_rows, cols * grid - 2 * cut_cols)
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=(overview, mosaic)),
            num_features=grid**2 + shown_rows * (shown_cols + 1),
            num_patches=(1 + rows * cols) * grid**2,
            numbers=(rows, cols, cut_rows, cut_cols),
        )

    def shown(self, rows: int, cols: int) -> tuple[int, int]:
        """How many of the mosaic's rows and columns of patches, padding left out, become features."""
        return rows, cols

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Features as the model makes them, newlines included. ``image_sizes``, (height, width) each as Hugging Face's
        processor returns them, are optional: the features are counted against them."""
        images_only(modality)
        size = given_size(extras)
        if size is not None:
            width, height = size
            expected = self.layout(modality, width, height, 1, {}).num_features
            if num_features != expected:
                raise RequestError(
                    f"A picture of height {height} and width {width} has {expected} features in this model, "
                    f"newlines included; got {num_features}.",
                    param="multi_modal_data",
                )
        return given_features(num_features)


def best_resolution(width: int, height: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(width, height) of the canvas that keeps most of the picture's pixels, and of those the one that wastes least.

    Source: HF ``select_best_resolution``. Of equals, the first.
    """

    def worth(pinpoint: tuple[int, int]) -> tuple[int, int]:
        canvas_height, canvas_width = pinpoint
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas_width * canvas_height

    canvas_height, canvas_width = max(pinpoints, key=worth)
    return canvas_width, canvas_height


def unpad(width: int, height: int, rows: int, cols: int) -> tuple[int, int]:
    """Patch rows and columns that see only padding, at either end of a mosaic of ``rows`` x ``cols`` patches.

    Source: HF ``unpad_image``. Of a very narrow picture nothing may be left.
    """
    if width / height > cols / rows:
        return (rows - int(round(height * (cols / width), 7))) // 2, 0
    return 0, (cols - int(round(width * (rows / height), 7))) // 2


def _fitted(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """(width, height) of the picture within the canvas, aspect kept. Source: HF ``get_patch_output_size``."""
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        return canvas_width, min(math.ceil(height * scale_x), canvas_height)
    return min(math.ceil(width * scale_y), canvas_width), canvas_height


def _check_sizes(settings: Mapping[str, Any], edge: int) -> None:
    """``ValueError`` unless overview and tiles are cut at the tower's size; then resizing and cropping them change
    nothing, whether the settings ask for it or not. Without a crop size, tiles have that of the overview."""
    crop = None if settings["crop_size"] is None else read_size(settings, "crop_size")
    for key, size in (("size", read_size(settings, "size")), ("crop_size", crop)):
        if size is not None and set(size.values()) != {edge}:
            raise ValueError(f"{key} is {settings[key]!r}; the vision tower takes {edge} x {edge}.")
    if crop is not None and "shortest_edge" in crop:
        raise ValueError(f"crop_size is {settings['crop_size']!r}; it must name a height and a width.")


def _pairs(pinpoints: Any) -> list[tuple[Any, ...]]:
    """The pinpoints as tuples, whether they are lists or tuples; what is neither becomes no pair."""
    rows = cast(Sequence[Any], pinpoints) if isinstance(pinpoints, list | tuple) else ()
    return [tuple(cast(Sequence[Any], row)) if isinstance(row, list | tuple) else () for row in rows]


def _read_pinpoints(given: Any, edge: int) -> tuple[tuple[int, int], ...]:
    """``ValueError`` where one is not a whole number of tiles."""
    pairs = tuple(_pairs(given))
    if not pairs or not all(
        len(pair) == 2 and all(isinstance(n, int) and n >= edge and n % edge == 0 for n in pair) for pair in pairs
    ):
        raise ValueError(
            f"image_grid_pinpoints is {given}; it must list pairs of height and width, multiples of the tower's {edge}."
        )
    return cast(tuple[tuple[int, int], ...], pairs)
