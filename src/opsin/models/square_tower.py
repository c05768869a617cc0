"""What config.json says of a CLIP-like vision tower, which takes square pictures of one size. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from opsin.errors import UnsupportedModelError

CLIP_LARGE_336: Mapping[str, Any] = {  # the vision_config of the tower that many checkpoints do not spell out
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SQUARE_TOWERS = {  # model_type: default image_size, default patch_size, extra rows before the patches (CLS)
    "clip_vision_model": (224, 32, 1),
    "siglip_vision_model": (224, 16, 0),
}


class SquareTower(NamedTuple):
    """What a tower for square pictures of one size returns.

    Attributes:
        image_size: edge of the square, in pixels.
        num_features: rows per square after the select strategy: 'default' drops the tower's first row, which is
            CLIP's class token (and, as in Hugging Face, SigLIP's first patch), 'full' keeps all.
    """

    image_size: int
    patch_size: int
    num_features: int

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def read_square_tower(config: Mapping[str, Any], *, family: str) -> SquareTower:
    """What config.json says of a CLIP-like tower.

    Raises:
        UnsupportedModelError: another tower, one that is not square, or another select strategy.
    """
    vision = config.get("vision_config") or {}
    tower = vision.get("model_type", "clip_vision_model")
    if tower not in _SQUARE_TOWERS:
        raise UnsupportedModelError(
            f"{family}'s vision tower is {tower!r}; implemented are {', '.join(sorted(_SQUARE_TOWERS))}."
        )
    default_size, default_patch, extra_rows = _SQUARE_TOWERS[tower]
    if not vision:  # LlavaConfig's own default
        default_size, default_patch = CLIP_LARGE_336["image_size"], CLIP_LARGE_336["patch_size"]
    image_size, patch_size = vision.get("image_size", default_size), vision.get("patch_size", default_patch)
    if not (isinstance(image_size, int) and isinstance(patch_size, int) and 1 <= patch_size <= image_size):
        raise UnsupportedModelError(
            f"The vision tower's image_size is {image_size!r} and its patch_size {patch_size!r}; "
            "only square pictures and patches are implemented."
        )
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise UnsupportedModelError(
            f"vision_feature_select_strategy is {strategy!r}; 'default' and 'full' are implemented."
        )
    num_rows = (image_size // patch_size) ** 2 + extra_rows
    return SquareTower(image_size, patch_size, num_rows - (strategy == "default"))
