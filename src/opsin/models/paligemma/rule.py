"""PaliGemma's pictures, one square view each, and its prompts: pictures, ``<bos>``, text, newline, seen both ways.

Source: Hugging Face ``PaliGemmaProcessor`` and ``SiglipImageProcessor``; arXiv:2407.07726.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from opsin.models.picture_rule import PictureRule, images_only
from opsin.models.picture_settings import (
    CLIP_PIXELS,
    SIGLIP_NORM,
    checkpoint_settings,
    read_norm,
    read_settings,
    square_view,
    with_options,
)
from opsin.models.placeholders import read_image_token, token_ids
from opsin.models.rule import TokenIds
from opsin.models.square_tower import SquareTower, read_square_tower
from opsin.types import MediaLayout, Modality, PixelPlan

_BOS = "<bos>"
_PROCESSORS: dict[str, dict[str, Any]] = {
    "SiglipImageProcessor": {
        **CLIP_PIXELS,
        "size": {"height": 224, "width": 224},
        **SIGLIP_NORM,
    }
}


@dataclass(frozen=True, kw_only=True)
class PaliGemmaRule(PictureRule):
    """The ``MediaRule`` of ``PaliGemmaForConditionalGeneration``."""

    tower: SquareTower

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        tower = read_square_tower({**config, "vision_feature_select_strategy": "full"}, family="PaliGemma")
        name, settings = read_settings(processor, _PROCESSORS, default="SiglipImageProcessor", family="PaliGemma")
        token_ids(tokenizer, _BOS)  # which prompts need
        mark, token_id = read_image_token(config, processor, tokenizer)
        with checkpoint_settings(name):
            rule = cls(tower=tower, mark=mark, image_token_id=token_id, norm=read_norm(settings), settings=settings)
            rule.layout("image", tower.image_size, tower.image_size, 1, {})  # what no picture can satisfy fails now
        return rule

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        view = square_view(with_options(self.settings, options), self.tower.image_size, width, height)
        plan = PixelPlan(width=width, height=height, views=(view,))
        return MediaLayout(plan, self.tower.num_features, self.tower.num_patches)

    def complete(self, text: str, signs: Sequence[tuple[int, int]], num_items: int) -> Sequence[tuple[int, str]]:
        """``<bos>`` behind the last picture, and a newline at the end unless it is there.

        Prompts may leave the pictures' marks out, as those of Hugging Face's and vLLM's examples do.
        """
        start = signs[-1][1] if signs else 0
        marks = "" if signs else self.mark.text * num_items
        return [(start, marks + _BOS), (len(text), "" if text.endswith("\n") else "\n")]

    def bidirectional(self, spans: Sequence[tuple[int, int]], prompt_len: int) -> list[tuple[int, int]]:
        return [(0, prompt_len)]
