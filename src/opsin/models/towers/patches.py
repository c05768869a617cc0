"""How every tower's input begins: uint8 tiles, cut into patches and normalised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F

from opsin.layers import Placement
from opsin.models.rule import PixelNorm

T = TypeVar("T")

MAX_PASS = 16384
"""Most patches of one pass: a long video alone may be many times what a step is planned for."""


def in_passes(
    run: Callable[[Sequence[T]], torch.Tensor], pictures: Sequence[T], num_patches: Sequence[int]
) -> torch.Tensor:
    """What ``run`` makes of the pictures, one after the other, in as few passes as hold ``MAX_PASS`` patches each; a
    larger picture is one alone."""
    parts: list[torch.Tensor] = []
    start = total = 0
    for i, count in enumerate(num_patches):
        if total and total + count > MAX_PASS:
            parts.append(run(pictures[start:i]))
            start, total = i, 0
        total += count
    parts.append(run(pictures[start:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def cut_blocks(picture_YX3: torch.Tensor, edge: int) -> torch.Tensor:
    """A picture as its blocks of ``edge`` x ``edge`` pixels, row by row: (blocks, edge, edge, 3)."""
    return picture_YX3.unflatten(1, (-1, edge)).unflatten(0, (-1, edge)).transpose(1, 2).flatten(0, 1)


class Patches:
    """Cuts tiles of one size into patches, row by row."""

    def __init__(self, place: Placement, patch_size: int, norm: PixelNorm) -> None:
        self.kernels = place.kernels
        self.dtype = place.dtype
        self.patch_size = patch_size
        self.norm_table_3 = torch.from_numpy(norm.table()).to(place.device)

    def __call__(self, tiles_BYX3: torch.Tensor) -> torch.Tensor:
        """uint8 (tiles, height, width, 3) to (tiles, patches, 3 * patch_size**2) in the model's dtype."""
        patches_PC = self.kernels.patchify(tiles_BYX3, self.patch_size, self.norm_table_3, self.dtype)
        return patches_PC.unflatten(0, (len(tiles_BYX3), -1))

    def in_passes(
        self, run: Callable[[torch.Tensor], torch.Tensor], tiles: Sequence[Sequence[torch.Tensor]]
    ) -> torch.Tensor:
        """What ``run`` makes of the patches of all items' equal tiles, (tiles, patches, values) in each pass."""
        return self.pictures_in_passes(lambda some: run(self(torch.stack(list(some)))), tiles)

    def pictures_in_passes(
        self, run: Callable[[Sequence[torch.Tensor]], torch.Tensor], tiles: Sequence[Sequence[torch.Tensor]]
    ) -> torch.Tensor:
        """What ``run`` makes of all items' tiles, uint8 (height, width, 3) of any sizes, some of them in each pass."""
        every = [tile for item in tiles for tile in item]
        size = self.patch_size
        num_patches = [(tile.shape[0] // size) * (tile.shape[1] // size) for tile in every]
        return in_passes(run, every, num_patches)

    def normalise(self, picture_YX3: torch.Tensor) -> torch.Tensor:
        """uint8 (height, width, 3) to float32 (3, height, width), for views that are made of the normalised pixels."""
        return torch.stack([self.norm_table_3[:, c].take(picture_YX3[..., c].long()) for c in range(3)])

    def of_floats(self, tiles_B3YX: torch.Tensor) -> torch.Tensor:
        """The patches of tiles that are normalised already."""
        return F.unfold(tiles_B3YX, self.patch_size, stride=self.patch_size).transpose(1, 2).to(self.dtype)
