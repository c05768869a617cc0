"""What the rules share whose pictures are square tiles, merged to a few features each. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opsin.errors import RequestError
from opsin.media.ops import output_size
from opsin.models.picture_rule import PictureRule
from opsin.types import Clip, MediaLayout, Modality, PixelOp, PixelPlan, View


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile on its way through tower and pixel shuffle.

    Attributes:
        edge: of the square that the tower takes, in pixels; what whole patches leave of them is cut off.
        patch_size: edge of a patch, in pixels.
        merge: edge of the block of patches that becomes one feature.
    """

    edge: int
    patch_size: int
    merge: int

    @property
    def size(self) -> dict[str, int]:
        """As processor configs say it."""
        return {"height": self.edge, "width": self.edge}

    @property
    def num_patches(self) -> int:
        return (self.edge // self.patch_size) ** 2

    @property
    def grid(self) -> int:
        """Features along an edge."""
        return self.edge // self.patch_size // self.merge

    @property
    def num_features(self) -> int:
        return self.grid**2


@dataclass(frozen=True, kw_only=True)
class TileRule(PictureRule):
    """A ``PictureRule`` whose pictures are several tiles, frames of its videos one each; all have as many features.

    Attributes:
        video_settings: the video processor's settings, complete; empty where the model takes no videos.
    """

    tile: Tile
    video_settings: Mapping[str, Any]

    def tiled(self, plan: PixelPlan, numbers: tuple[int, ...] = (), times: tuple[float, ...] = ()) -> MediaLayout:
        """The layout of a plan whose views are tiles."""
        num_tiles = len(plan.tile_sizes) * len(plan.frames)
        return MediaLayout(
            plan, num_tiles * self.tile.num_features, num_tiles * self.tile.num_patches, numbers=numbers, times=times
        )

    def whole_view(self, ops: tuple[PixelOp, ...], width: int, height: int) -> View:
        """One tile of the whole picture.

        Args:
            ops: the last of them makes it a tile; none leave it as it is.

        Raises:
            RequestError: none, of a picture that is no tile.
            MediaError: nothing would be left of it on the way.
        """
        edge = self.tile.edge
        if output_size(ops, width, height) != (edge, edge):
            raise RequestError(
                f"Without do_resize, pictures and frames must have {edge} x {edge} pixels, not {width} x {height}.",
                param="multi_modal_data",
            )
        return View(ops, height=edge, width=edge)

    def framed(self, clip: Clip, ops: tuple[PixelOp, ...], times: tuple[float, ...] = ()) -> MediaLayout:
        """The layout of a video of which each frame is a ``whole_view``."""
        view = self.whole_view(ops, clip.width, clip.height)
        return self.tiled(PixelPlan(clip.width, clip.height, (view,), clip.frames), times=times)

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Features of whole tiles, that need nothing beside them."""
        layout = super().embedding_layout(modality, num_features, extras)
        if num_features % self.tile.num_features:
            raise RequestError(
                f"The {modality}'s embedding has {num_features} rows; this model's come in whole tiles of "
                f"{self.tile.num_features}, of which each frame of a video is one.",
                param="multi_modal_data",
            )
        return layout


def covering_grid(width: int, height: int, edge: int) -> tuple[int, int]:
    """(columns, rows) of tiles: the long side in whole tiles, then the short one that keeps its ratio, in whole tiles.

    Source: HF ``Idefics3ImageProcessor.resize_for_vision_encoder``.
    """
    long = math.ceil(max(width, height) / edge) * edge
    covered_width, covered_height = with_long_side(long, width / height)
    return math.ceil(covered_width / edge), math.ceil(covered_height / edge)


def with_long_side(long: int, aspect: float, multiple: int = 1) -> tuple[int, int]:
    """(width, height) of a picture that is ``aspect`` times as wide as high; the short side is cut to an integer, as
    Hugging Face does, then filled up to a multiple, at least 1."""
    short = int(long / aspect) if aspect >= 1 else int(long * aspect)
    short = max(1, math.ceil(short / multiple) * multiple)
    return (long, short) if aspect >= 1 else (short, long)


def grids(counts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(columns, rows) of all grids of ``counts`` tiles, each from the tallest to the widest."""
    return ((cols, n // cols) for n in counts for cols in range(1, n + 1) if n % cols == 0)
