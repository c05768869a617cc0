"""The pictures of Pixtral and Mistral 3: each at its own resolution, in whole features, with a token after each row.

Source: Hugging Face ``PixtralImageProcessor`` (Pillow-backed) and ``PixtralProcessor``; arXiv:2410.07073.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from opsin.errors import RequestError, UnsupportedModelError
from opsin.models.picture_rule import PictureRule, given_size, images_only
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    check_built,
    check_pixels,
    checkpoint_settings,
    fitted_view,
    read_longest_size,
    read_resample,
    read_settings,
    request_settings,
    with_options,
)
from opsin.models.placeholders import read_image_token, token_ids
from opsin.models.rule import TokenIds, TokenRun
from opsin.types import MediaLayout, Modality, PixelPlan

_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "PixtralImageProcessor": {
        **CLIP_PIXELS,
        **_TOKENS,
        "size": {"longest_edge": 1024},
        "spatial_merge_size": None,
        "do_pad": True,  # fills batches up, which never reaches the tower
    }
}
_FIXED = frozenset({*_TOKENS, "spatial_merge_size"})


@dataclass(frozen=True, slots=True)
class PatchGeometry:
    """From pixels to features.

    Attributes:
        patch_size: edge of a patch, in pixels.
        merge: edge of the block of patches that becomes one feature.
    """

    patch_size: int
    merge: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> PatchGeometry:
        """Read it from config.json; Pixtral, which is a LLaVA, merges nothing.

        Raises:
            UnsupportedModelError: numbers that are none.
        """
        vision = config.get("vision_config")
        patch_size = vision.get("patch_size", 16) if vision else 14  # PixtralVisionConfig's, and Mistral3Config's own
        merge = config.get("spatial_merge_size", 2) if config.get("model_type", "mistral3") == "mistral3" else 1
        if not all(type(n) is int and n >= 1 for n in (patch_size, merge)):
            raise UnsupportedModelError(
                f"vision_config.patch_size is {patch_size!r} and spatial_merge_size {merge!r}; they must be whole "
                "numbers of at least 1."
            )
        return cls(patch_size, merge)

    @property
    def unit(self) -> int:
        """Edge of a feature, in pixels."""
        return self.patch_size * self.merge


@dataclass(frozen=True, kw_only=True)
class Mistral3Rule(PictureRule):
    """The ``MediaRule`` of ``Mistral3ForConditionalGeneration``, and of a ``LlavaForConditionalGeneration`` whose tower
    is Pixtral's.

    A layout's ``numbers`` are its (rows, columns) of features.
    """

    geometry: PatchGeometry
    break_token_id: int
    end_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        geometry = PatchGeometry.from_hf(config)
        name, settings = read_settings(
            processor, _PROCESSORS, default="PixtralImageProcessor", family="Pixtral and Mistral 3"
        )
        break_id, end_id = token_ids(tokenizer, settings["image_break_token"], settings["image_end_token"])
        with checkpoint_settings(name):
            check_built(settings, spatial_merge_size=geometry.merge)
        mark, token_id = read_image_token(config, settings, tokenizer)
        return cls(
            geometry=geometry,
            break_token_id=break_id,
            end_token_id=end_id,
            mark=mark,
            image_token_id=token_id,
            norm=check_pixels(name, settings, read_resample, _read_bounds),
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=_FIXED)
        unit = self.geometry.unit
        with request_settings():
            bounds = _read_bounds(settings)
        view = fitted_view(settings, unit, width, height, lambda: _fitted(width, height, bounds, unit))
        rows, cols = view.height // unit, view.width // unit
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=(view,)),
            num_features=rows * cols,
            num_patches=rows * cols * self.geometry.merge**2,
            numbers=(rows, cols),
        )

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Features with the ``image_sizes`` of their pictures, (height, width) each: rows end where those say."""
        images_only(modality)
        size = given_size(extras)
        if size is None:
            raise RequestError(
                "Image embeddings of this model come with the sizes of their pictures, since a token ends each row of "
                "features: {'image_embeds': tensor, 'image_sizes': [(height, width)]}.",
                param="multi_modal_data",
            )
        return self.sized_features(num_features, size)

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun]:
        images_only(modality)
        rows, cols = layout.numbers
        features = TokenRun(self.image_token_id, cols, is_feature=True)
        return [*(features, TokenRun(self.break_token_id)) * (rows - 1), features, TokenRun(self.end_token_id)]


def _fitted(width: int, height: int, bounds: tuple[int, int], unit: int) -> tuple[int, int]:
    """(width, height) within the bounds, then up to whole features; 0 where a side vanishes.

    Source: HF ``get_resize_output_image_size``.
    """
    ratio = max(height / bounds[1], width / bounds[0])
    if ratio > 1:
        width, height = math.floor(width / ratio), math.floor(height / ratio)
    return math.ceil(width / unit) * unit, math.ceil(height / unit) * unit


def _read_bounds(settings: Mapping[str, Any]) -> tuple[int, int]:
    """The most (width, height). ``ValueError`` where size is neither {"longest_edge"} nor {"height", "width"}."""
    size = read_longest_size(settings)
    edge = size.get("longest_edge")
    return (edge, edge) if edge is not None else (size["width"], size["height"])
