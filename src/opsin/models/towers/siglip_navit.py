"""SigLIP on pictures of any size, packed (NaViT, arXiv:2307.06304), as Idefics2 and MiniCPM-V have it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from opsin.layers import Placement
from opsin.layers.norm import LayerNorm
from opsin.layers.staging import upload
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.patches import Patches
from opsin.models.towers.siglip import SiglipEmbeddings
from opsin.models.towers.vit import ViTConfig, ViTEncoder

_IDEFICS3_DEFAULTS: dict[str, Any] = {  # Idefics3VisionConfig's
    "hidden_size": 1152,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_LEFT_BY_IDEFICS3 = ("max_image_size", "size", "tie_word_embeddings")  # in its configs, and without effect


class PackedPatches(NamedTuple):
    """Hidden states of the patches of several pictures, one after the other, and (rows, columns) of each picture."""

    x_PD: torch.Tensor
    grids: list[tuple[int, int]]


class SiglipNavitTower(nn.Module):
    """uint8 pictures to hidden states after the final norm.

    The table of positions is that of a square. A patch of a picture takes the one that lies where it does, in fractions
    of the sides.
    """

    def __init__(self, place: Placement, config: ViTConfig, norm: PixelNorm) -> None:
        super().__init__()
        self.num_positions = config.image_size // config.patch_size  # along either side
        self.patches = Patches(place, config.patch_size, norm)
        self.embeddings = SiglipEmbeddings(place, config)
        self.encoder = ViTEncoder(place, config)
        self.post_layernorm = LayerNorm(place, config.hidden_size, config.norm_eps)

    @staticmethod
    def read_config(vision_config: Mapping[str, Any]) -> ViTConfig:
        """The shape of Idefics3's and SmolVLM's.

        Raises:
            UnsupportedModelError: an unknown key or value.
        """
        config = StrictConfig({**_IDEFICS3_DEFAULTS, **vision_config}, "vision_config")
        result = ViTConfig.from_hf(config, -1, defaults=_IDEFICS3_DEFAULTS)
        config.skip(*_LEFT_BY_IDEFICS3)
        config.choose("use_base_siglip", (False,), False)
        config.finish()
        return result

    def forward(self, pictures: Sequence[torch.Tensor]) -> PackedPatches:
        """(height, width, 3) each, sides in whole patches."""
        size = self.patches.patch_size
        grids = [(picture.shape[0] // size, picture.shape[1] // size) for picture in pictures]
        groups = [list(group) for _, group in itertools.groupby(pictures, key=lambda picture: picture.shape)]
        patches_PC = torch.cat([self.patches(torch.stack(group)).flatten(0, 1) for group in groups])
        (positions_P,) = upload([self._positions(grids).numpy()], patches_PC.device)
        embeddings = self.embeddings
        x_PD = embeddings.patch_embedding(patches_PC) + F.embedding(positions_P, embeddings.position_embedding.weight)
        return PackedPatches(self.post_layernorm(self.encoder.packed(x_PD, [r * c for r, c in grids])), grids)

    def _positions(self, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Row of the table for each patch, int64 on the host."""
        along = {side: part_below(side, self.num_positions) for side in {side for grid in grids for side in grid}}
        return torch.cat(
            [(along[rows].unsqueeze(1) * self.num_positions + along[cols]).flatten() for rows, cols in grids]
        )


def part_below(side: int, num_parts: int) -> torch.Tensor:
    """For each of ``side`` patches along a side, the last of ``num_parts`` equal parts that begins no later, int64.

    In float32, since its rounding decides where a patch and a part begin together: at 4 of 25 patches over 70 parts, it
    is the part before. Source: HF ``Idefics2VisionEmbeddings``.
    """
    begins = torch.arange(0, 1 - 1e-6, (1 / torch.tensor(side)).item())
    borders = torch.arange(1 / num_parts, 1.0, 1 / num_parts)
    return torch.bucketize(begins, borders, right=True)
