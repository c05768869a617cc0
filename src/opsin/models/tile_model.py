"""Families whose tower takes square tiles of one size, each by itself: LLaVA and its kin, PaliGemma, Gemma 3 and
InternVL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from opsin.layers import Placement
from opsin.models.decoder import Decoder
from opsin.models.picture_model import PictureModel
from opsin.models.rule import PixelNorm
from opsin.models.towers.clip import ClipTower
from opsin.models.towers.intern_vit import InternViTTower
from opsin.models.towers.patches import Patches
from opsin.models.towers.siglip import SiglipTower
from opsin.types import MediaLayout


class TileModel(PictureModel):
    """A ``PictureModel`` of tower, projector and decoder. A family brings ``from_hf``, and what becomes of the features
    of several tiles where they do not just follow one another.

    Attributes:
        architecture: the family's name in config.json.
    """

    architecture: ClassVar[str]

    def __init__(
        self,
        place: Placement,
        tower: ClipTower | SiglipTower | InternViTTower,
        projector: nn.Module,
        decoder: Decoder,
        norm: PixelNorm,
        *,
        drop_first: bool = False,
    ) -> None:
        """
        Args:
            projector: (tiles, patches, tower's width) to (tiles, features, decoder's width).
            drop_first: leave out the first patch of each tile. It is CLIP's and InternViT's class token; HF drops
                SigLIP's first patch too, and checkpoints were trained so.
        """
        super().__init__(self.architecture, decoder)
        self.tower = tower
        self.projector = projector
        self.drop_first = drop_first
        self.patches = Patches(place, tower.config.patch_size, norm)

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """(sum of num_features, D), the tiles of all pictures in as few passes as can be."""
        return self.encode_tiles(tiles).flatten(0, 1)

    def encode_tiles(self, tiles: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Features of every tile of every item, (B, M, D), in as few passes as can be."""
        return self.patches.in_passes(self._encode, tiles)

    def _encode(self, patches_BPC: torch.Tensor) -> torch.Tensor:
        hidden_BPD = self.tower(patches_BPC)
        return self.projector(hidden_BPD[:, 1:] if self.drop_first else hidden_BPD)
