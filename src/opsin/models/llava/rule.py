"""LLaVA's pictures: one square view, resized and cropped as the checkpoint's CLIP-like processor does it.

Source: Hugging Face ``LlavaProcessor`` and the Pillow-backed image processors it is used with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from opsin.errors import RequestError
from opsin.media.ops import output_size
from opsin.models.picture_rule import PictureRule, images_only
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    SIGLIP_NORM,
    checkpoint_settings,
    per_channel,
    read_norm,
    read_resample,
    read_settings,
    read_size,
    request_settings,
    with_options,
)
from opsin.models.placeholders import read_image_token
from opsin.models.rule import TokenIds
from opsin.models.square_tower import read_square_tower
from opsin.types import Crop, MediaLayout, Modality, Pad, PixelOp, PixelPlan, Resize, View

_CLIP_DEFAULTS: dict[str, Any] = {
    **CLIP_PIXELS,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_pad": False,
}
_SIGLIP_DEFAULTS: dict[str, Any] = _CLIP_DEFAULTS | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "crop_size": None,
    **SIGLIP_NORM,
}
_PROCESSORS = {
    "BitImageProcessor": _CLIP_DEFAULTS,
    "CLIPImageProcessor": _CLIP_DEFAULTS,
    "LlavaImageProcessor": _CLIP_DEFAULTS,
    "SiglipImageProcessor": _SIGLIP_DEFAULTS,
}


@dataclass(frozen=True, kw_only=True)
class LlavaRule(PictureRule):
    """The ``MediaRule`` of ``LlavaForConditionalGeneration``.

    Attributes:
        image_size: edge of the square that the tower takes, in pixels.
        num_features: rows per picture.
        pads_to_square: the processor is the one whose ``do_pad`` squares the picture before it is resized.
    """

    image_size: int
    patch_size: int
    num_features: int
    pads_to_square: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        tower = read_square_tower(config, family="LLaVA")
        # Without a class name Hugging Face goes by the model type.
        name, settings = read_settings(processor, _PROCESSORS, default="LlavaImageProcessor", family="LLaVA")
        with checkpoint_settings(name):
            norm = read_norm(settings)
        mark, token_id = read_image_token(config, processor, tokenizer)
        rule = cls(
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            num_features=tower.num_features,
            mark=mark,
            image_token_id=token_id,
            norm=norm,
            settings=settings,
            pads_to_square=name == "LlavaImageProcessor",
        )
        with checkpoint_settings(name):  # settings that no picture can satisfy should fail now, not request by request
            rule.layout("image", tower.image_size, tower.image_size, 1, {})
        return rule

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options)
        with request_settings():
            ops = _plan_ops(settings, width, height, self.pads_to_square)
        made = output_size(ops, width, height)
        if made != (self.image_size, self.image_size):
            raise RequestError(
                f"The processor's settings make {made[0]} x {made[1]} pixels of this {width} x {height} picture; "
                f"the vision tower takes {self.image_size} x {self.image_size}.",
                param="mm_processor_kwargs" if options else None,
            )
        view = View(ops=ops, height=self.image_size, width=self.image_size)
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=(view,)),
            num_features=self.num_features,
            num_patches=(self.image_size // self.patch_size) ** 2,
        )


def _plan_ops(settings: Mapping[str, Any], width: int, height: int, pads_to_square: bool) -> tuple[PixelOp, ...]:
    """The operations for one picture; ``ValueError`` says which setting is wrong."""
    ops: list[PixelOp] = []
    if settings["do_pad"]:
        if not pads_to_square:
            raise ValueError("do_pad is implemented for LlavaImageProcessor alone.")
        edge = max(width, height)
        left, top = (edge - width) // 2, (edge - height) // 2
        red, green, blue = (int(mean * 255) for mean in per_channel("image_mean", settings))
        ops.append(Pad(left, top, edge - width - left, edge - height - top, (red, green, blue)))
        width = height = edge
    if settings["do_resize"]:
        width, height = _resized(read_size(settings, "size"), width, height)
        ops.append(Resize(width, height, read_resample(settings)))
    if settings["do_center_crop"]:
        crop = read_size(settings, "crop_size")
        if "shortest_edge" in crop:
            raise ValueError(f"crop_size is {settings['crop_size']!r}; it must name a height and a width.")
        # Floor division centres as Hugging Face does, also where the crop is larger than the picture and the
        # offset is negative.
        left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
        ops.append(Crop(left, top, crop["width"], crop["height"]))
    return tuple(ops)


def _resized(size: Mapping[str, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) after the resize; the long edge is cut to an integer, as Hugging Face does."""
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    edge = size["shortest_edge"]
    long_edge = int(edge * max(width, height) / min(width, height))
    return (edge, long_edge) if width <= height else (long_edge, edge)
