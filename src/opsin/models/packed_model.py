"""Families whose tower takes pictures of any size, packed: MiniCPM-V, Mistral 3 and Pixtral, Idefics3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from opsin.models.decoder import Decoder
from opsin.models.picture_model import PictureModel
from opsin.models.towers.pixtral import PixtralTower
from opsin.models.towers.siglip_navit import SiglipNavitTower
from opsin.types import MediaLayout


class PackedModel(PictureModel):
    """A ``PictureModel`` of tower, projector and decoder, to which every tile of every picture is a picture of its own.
    A family brings ``from_hf``."""

    def __init__(
        self, architecture: str, tower: PixtralTower | SiglipNavitTower, projector: nn.Module, decoder: Decoder
    ) -> None:
        """
        Args:
            projector: what the tower returns to (features, decoder's width), one picture's after the other's.
        """
        super().__init__(architecture, decoder)
        self.tower = tower
        self.projector = projector

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """(sum of num_features, D), the tiles of all pictures in as few passes as can be."""
        return self.tower.patches.pictures_in_passes(lambda some: self.projector(self.tower(some)), tiles)
