"""Phi-3-vision and Phi-3.5-vision, arXiv:2404.14219 (``Phi3VForCausalLM``): tower, separators, projector, decoder.

Source: ``image_embedding_phi3_v.py`` and ``modeling_phi3_v.py``, the code published with the checkpoints; none of it is
run. VLM2Vec-Full (arXiv:2410.05160) is the same network, its last token's hidden state the vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from opsin.layers import Placement
from opsin.layers.staging import upload
from opsin.models.decoder import Decoder, DecoderConfig
from opsin.models.phi3_v.rule import read_tile, tower_config
from opsin.models.picture_model import PictureModel
from opsin.models.projector import Projector, pixel_shuffle
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.tiles import Tile
from opsin.models.towers.clip import ClipTower
from opsin.models.towers.patches import MAX_PASS, Patches
from opsin.models.weights import WeightTable
from opsin.types import MediaLayout

_OWN_KEYS = ("_attn_implementation", "embd_layer", "img_processor", "vision_config")
_ORDER = {
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
_RENAMES = (
    (r"^model\.vision_embed_tokens\.img_processor\.vision_model\.", "tower."),
    (r"^model\.vision_embed_tokens\.img_projection\.0\.", "projector.linear_1."),
    (r"^model\.vision_embed_tokens\.img_projection\.2\.", "projector.linear_2."),
    (r"^model\.vision_embed_tokens\.sub_GN$", "row_separator"),
    (r"^model\.vision_embed_tokens\.glb_GN$", "view_separator"),
    (r"^model\.vision_embed_tokens\.wte\.", "decoder.wte."),
    (r"^model\.", "decoder."),
    (r"^lm_head\.", "decoder.lm_head."),
)


class Phi3VModel(PictureModel):
    """A picture is a mosaic of tiles, and an overview made of them here.

    LongRoPE: the reference takes its short factors while a sequence is no longer than the original context, the long
    ones from then on, without turning the keys it has cached. Here an engine takes one of them for all its requests,
    by the longest sequence it may run (``max_model_len``), so that an answer depends on nothing but its own prompt:
    exactly the reference for sequences on either side of the border, and what vLLM does.
    """

    renames = _RENAMES

    def __init__(self, place: Placement, tile: Tile, tower: ClipTower, decoder: Decoder, norm: PixelNorm) -> None:
        super().__init__("Phi3VForCausalLM", decoder)
        self.tile = tile
        self.tower = tower
        self.patches = Patches(place, tile.patch_size, norm)
        width = tower.config.hidden_size * tile.merge**2
        self.projector = Projector(place, width, decoder.config.hidden_size, "gelu", bias=True)
        self.row_separator = place.parameter(1, 1, 1, width)
        self.view_separator = place.parameter(1, 1, width)

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, place: Placement, norm: PixelNorm, max_model_len: int | None = None
    ) -> Self:
        text = {key: value for key, value in config.items() if key not in _OWN_KEYS}
        text = {"original_max_position_embeddings": 4096, **text, "model_type": "phi3"}
        decoder_config = DecoderConfig.from_hf(text)
        vision = tower_config(config)
        tower = ClipTower(place, ClipTower.read_config(vision, _read_layer(config, vision)))
        return cls(place, read_tile(vision), tower, Decoder(place, decoder_config, max_model_len), norm)

    def weight_table(self) -> WeightTable:
        table = super().weight_table()
        return WeightTable(table.renames, (*table.unused, r"decoder\.wte\.weight"))  # the embedding table once more

    def encode(self, tiles: Sequence[Sequence[torch.Tensor]], layouts: Sequence[MediaLayout]) -> torch.Tensor:
        """(sum of num_features, D), tiles and overviews in as few passes as can be."""
        parts_BPC = [self.patches(torch.stack([tile for item in tiles for tile in item]))]
        parts_BPC += [self.patches.of_floats(self._overview(*pair)) for pair in zip(tiles, layouts, strict=True)]
        passes = torch.cat(parts_BPC).split(max(1, MAX_PASS // self.tile.num_patches))
        hidden_BPD = torch.cat([self.tower(some_BPC) for some_BPC in passes])[:, 1:]
        separators = [self.row_separator.flatten(0, 2), self.view_separator.flatten(0, 1)]
        rows_MD = self.projector(torch.cat([pixel_shuffle(hidden_BPD, self.tile.merge), *separators]))
        (order_M,) = upload([feature_order(layouts, self.tile.grid)], rows_MD.device)
        return rows_MD.index_select(0, order_M)

    def _overview(self, tiles: Sequence[torch.Tensor], layout: MediaLayout) -> torch.Tensor:
        """The mosaic, normalised and scaled to one tile: float32 (1, 3, edge, edge).

        Not antialiased, as the reference has it: of each pixel's neighbours at most four by four count.
        """
        mosaic_YX3 = torch.stack(list(tiles)).unflatten(0, layout.numbers).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return F.interpolate(self.patches.normalise(mosaic_YX3).unsqueeze(0), (self.tile.edge,) * 2, mode="bicubic")


def _read_layer(config: Mapping[str, Any], vision: Mapping[str, Any]) -> int:
    """The tower's layer whose output is taken.

    Raises:
        UnsupportedModelError: features or an order of them other than those of the published checkpoints.
    """
    features = StrictConfig(config.get("img_processor") or {}, "img_processor")
    features.choose("name", ("clip_vision_model",), "clip_vision_model")
    features.choose("image_dim_out", (vision["hidden_size"],), None)
    features.choose("type_feature", ("patch",), "patch")
    features.skip("model_name", "num_img_tokens")
    layer = features.take("layer_idx", -2)
    order = StrictConfig(config.get("embd_layer") or {}, "embd_layer")
    for name, implemented in _ORDER.items():
        order.choose(name, (implemented,), None)
    order.skip("embedding_cls")
    for section in (features, order):
        section.finish()
    return layer


def feature_order(layouts: Sequence[MediaLayout], grid: int) -> npt.NDArray[np.int64]:
    """Where each feature of each picture comes from: a row of the ``grid`` x ``grid`` features of a tile, all tiles
    first, then all overviews, then the separator of rows and that of views."""
    area = grid * grid
    num_tiles = sum(rows * cols for rows, cols in (layout.numbers for layout in layouts))
    row_end = area * (num_tiles + len(layouts))
    parts: list[npt.NDArray[np.int64]] = []
    tile = 0
    for i, layout in enumerate(layouts):
        rows, cols = layout.numbers
        mosaic = _numbered(tile, rows, cols, grid)
        overview = _numbered(num_tiles + i, 1, 1, grid)
        tile += rows * cols
        with_ends = [np.pad(view, ((0, 0), (0, 1)), constant_values=row_end).ravel() for view in (mosaic, overview)]
        parts += [with_ends[0], np.array([row_end + 1]), with_ends[1]]
    return np.concatenate(parts)


def _numbered(first: int, rows: int, cols: int, grid: int) -> npt.NDArray[np.int64]:
    """The features of ``rows`` x ``cols`` tiles as they lie in the picture, numbered tile by tile from ``first``'s."""
    area = grid * grid
    tiles = np.arange(first * area, (first + rows * cols) * area).reshape(rows, cols, grid, grid)
    return tiles.transpose(0, 2, 1, 3).reshape(rows * grid, cols * grid)
