"""The vision towers of Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923) and Qwen3-VL (arXiv:2511.21631):
pictures of any size, packed; and what GLM-4.1V's (``glm_vit.py``) shares with them.

A video is a row of pictures that do not see one another, each of ``num_frames`` frames. Patches run in merge order: the
``merge_size`` x ``merge_size`` patches that become one feature are neighbours. So a picture is first cut into the
blocks of pixels that become features, and each block into its patches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from opsin.errors import UnsupportedModelError
from opsin.kernels.reference import ACTIVATIONS
from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.layers.mlp import MLP, GatedMLP
from opsin.layers.norm import LayerNorm, RMSNorm, added, normed
from opsin.layers.rope import Rotary
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers import trunk
from opsin.models.towers.attention import PatchAttention, Segments
from opsin.models.towers.packing import pack
from opsin.models.towers.patches import Patches, cut_blocks, in_passes

RENAMES = (  # of what checkpoints of all three families call the tower's parts, once it is ``tower``
    (r"^tower\.patch_embed\.proj\.", "tower.patch_embed."),
    (r"^tower\.pos_embed\.", "tower.positions."),
    (r"^(tower\.blocks\.\d+\.attn\.)qkv\.", r"\1qkv_proj."),
    (r"^(tower\.blocks\.\d+\.attn\.)proj\.", r"\1out_proj."),
    (r"^(tower\.blocks\.\d+\.mlp\.)linear_fc", r"\1fc"),
    (r"^tower\.merger\.mlp\.0\.", "tower.merger.linear_1."),
    (r"^tower\.merger\.mlp\.2\.", "tower.merger.linear_2."),
    (r"^tower\.deepstack_merger_list\.", "tower.deep_mergers."),
    (r"^(tower\.(?:merger|deep_mergers\.\d+)\.)norm\.", r"\1ln_q."),
    (r"^(tower\.(?:merger|deep_mergers\.\d+)\.)linear_fc", r"\1linear_"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenViTConfig:
    """Shape of the tower.

    Attributes:
        out_size: width of the features, which is the decoder's.
        num_frames: frames that a patch reaches over; of a still picture, equal ones.
        is_gated: RMSNorm and a gated MLP (Qwen2.5-VL) in place of LayerNorm and a plain one.
        window: edge of the attention windows in features; None where every layer sees the whole picture.
        full_layers: with windows, the layers that see the whole picture all the same.
        position_edge: of the square of learned positions (Qwen3-VL), beside the rotary ones.
        deep_layers: layers whose outputs become columns of the features, too, behind the last layer's.
        qkv_bias: queries, keys and values have biases; ``output_bias``: what follows attention, and the MLP.
        merger_size: the width inside of a gated merger (GLM-4.1V).
    """

    hidden_size: int
    intermediate_size: int
    out_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    merge_size: int
    num_frames: int
    hidden_act: str
    rope_theta: float
    is_gated: bool
    window: int | None = None
    full_layers: frozenset[int] = frozenset()
    patch_bias: bool = False
    position_edge: int | None = None
    deep_layers: tuple[int, ...] = ()
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    output_bias: bool = True
    merger_size: int | None = None

    @classmethod
    def from_qwen2_vl(cls, config: StrictConfig) -> QwenViTConfig:
        """Read Qwen2-VL's vision_config.

        Raises:
            UnsupportedModelError: an unknown key or value.
        """
        width = config.take("embed_dim", 1280)
        return cls._read(
            config,
            hidden_size=width,
            intermediate_size=int(width * config.take("mlp_ratio", 4)),
            out_size=config.take("hidden_size", 3584),
            hidden_act=config.choose("hidden_act", tuple(ACTIVATIONS), "quick_gelu"),
            is_gated=False,
        )

    @classmethod
    def from_qwen2_5_vl(cls, config: StrictConfig) -> QwenViTConfig:
        """Read Qwen2.5-VL's vision_config.

        Raises:
            UnsupportedModelError: an unknown key or value.
        """
        config.skip("tokens_per_second")  # the rule's
        unit = config.take("patch_size", 14) * config.take("spatial_merge_size", 2)
        return cls._read(
            config,
            hidden_size=config.take("hidden_size", 3584),
            intermediate_size=config.take("intermediate_size", 3420),
            out_size=config.take("out_hidden_size", 3584),
            hidden_act=config.choose("hidden_act", tuple(ACTIVATIONS), "silu"),
            is_gated=True,
            window=max(1, config.take("window_size", 112) // unit),
            full_layers=frozenset(config.take("fullatt_block_indexes", (7, 15, 23, 31))),
        )

    @classmethod
    def from_qwen3_vl(cls, config: StrictConfig) -> QwenViTConfig:
        """Read Qwen3-VL's vision_config.

        Raises:
            UnsupportedModelError: an unknown key or value.
        """
        num_positions = config.take("num_position_embeddings", 2304)
        edge = math.isqrt(num_positions)
        if edge**2 != num_positions:
            raise UnsupportedModelError(f"num_position_embeddings is {num_positions}; only squares are implemented.")
        deep_layers = tuple(config.take("deepstack_visual_indexes", (8, 16, 24)))
        if list(deep_layers) != sorted({*deep_layers} & {*range(config.take("depth", 27))}):
            raise UnsupportedModelError(
                f"deepstack_visual_indexes is {deep_layers}; it must list layers of the tower, ascending."
            )
        shape = cls._read(
            config,
            hidden_size=config.take("hidden_size", 1152),
            intermediate_size=config.take("intermediate_size", 4304),
            out_size=config.take("out_hidden_size", 3584),
            hidden_act=config.choose("hidden_act", tuple(ACTIVATIONS), "gelu_pytorch_tanh"),
            is_gated=False,
            num_layers=27,
            patch_size=16,
        )
        return replace(shape, patch_bias=True, position_edge=edge, deep_layers=deep_layers)

    @classmethod
    def from_glm4v(cls, config: StrictConfig) -> QwenViTConfig:
        """Read GLM-4.1V's vision_config, in which the blocks' inner width is called that of the features.

        Raises:
            UnsupportedModelError: an unknown key or value.
        """
        config.skip("hidden_dropout_prob")
        image_size, patch_size = config.take("image_size", 336), config.take("patch_size", 14)
        if not all(type(size) is int and size > 0 for size in (image_size, patch_size)):
            raise UnsupportedModelError(
                f"vision_config has image_size {image_size} and patch_size {patch_size}; only squares are implemented."
            )
        out_size = config.take("out_hidden_size", 4096)
        more: dict[str, Any] = {
            "norm_eps": config.take("rms_norm_eps", 1e-5),
            "qkv_bias": bool(config.take("attention_bias", False)),
            "merger_size": config.take("intermediate_size", 13696),
        }
        shape = cls._read(
            config,
            hidden_size=config.take("hidden_size", 1536),
            intermediate_size=out_size,
            out_size=out_size,
            hidden_act=config.choose("hidden_act", tuple(ACTIVATIONS), "silu"),
            is_gated=True,
            num_layers=24,
            num_heads=12,
        )
        return replace(shape, patch_bias=True, position_edge=image_size // patch_size, output_bias=False, **more)

    @classmethod
    def _read(
        cls,
        config: StrictConfig,
        *,
        hidden_size: int,
        intermediate_size: int,
        out_size: int,
        hidden_act: str,
        is_gated: bool,
        window: int | None = None,
        full_layers: frozenset[int] = frozenset(),
        num_layers: int = 32,
        num_heads: int = 16,
        patch_size: int = 14,
    ) -> QwenViTConfig:
        """Add what all name alike, with the defaults given for it, and refuse what is left."""
        rope = config.take("rope_parameters", {})
        if rope.get("rope_type", "axial") != "axial" or set(rope) - {"rope_type", "rope_theta"}:
            raise UnsupportedModelError(f"vision_config.rope_parameters is {rope}; only plain 'axial' is implemented.")
        patch_size = config.take("patch_size", patch_size)
        for name in ("in_channels", "in_chans"):
            config.choose(name, (3,), 3)
        config.choose("spatial_patch_size", (patch_size,), patch_size)
        num_layers, num_heads = config.take("depth", num_layers), config.take("num_heads", num_heads)
        if hidden_size % (4 * num_heads):
            raise UnsupportedModelError(
                f"The vision tower has {num_heads} heads over {hidden_size} values; heads must be multiples of 4 wide."
            )
        result = cls(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            out_size=out_size,
            num_layers=num_layers,
            num_heads=num_heads,
            patch_size=patch_size,
            merge_size=config.take("spatial_merge_size", 2),
            num_frames=config.take("temporal_patch_size", 2),
            hidden_act=hidden_act,
            rope_theta=float(rope.get("rope_theta") or 10000.0),
            is_gated=is_gated,
            window=window,
            full_layers=full_layers,
        )
        config.finish()
        return result

    def check_width(self, hidden_size: int) -> None:
        """Raises UnsupportedModelError: the decoder, which is ``hidden_size`` wide, cannot take the features."""
        if self.out_size != hidden_size:
            raise UnsupportedModelError(
                f"The vision tower's features have {self.out_size} values; the decoder takes {hidden_size}."
            )


class MergingTower(nn.Module, ABC):
    """Pictures to features, merger included; of that, a family brings what is behind the embedded patches."""

    unused_weights = (r"rotary_pos_emb\.inv_freq",)

    def __init__(self, place: Placement, config: QwenViTConfig, norm: PixelNorm) -> None:
        super().__init__()
        self.config = config
        self.patches = Patches(place, config.patch_size, norm)
        size = config.hidden_size // config.num_heads // 2  # of each head, for rows; as much for columns
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        self.inverse_frequencies = (1.0 / config.rope_theta**exponents).to(place.device)
        self.patch_embed = PatchEmbedding(place, config)
        self.blocks = nn.ModuleList(QwenViTBlock(place, config) for _ in range(config.num_layers))

    def forward(self, pictures: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Pictures, sides in whole features, to (M, out_size * (1 + deep layers)), one after the other.

        Args:
            pictures: uint8 (height, width, 3), once for a still picture, or the ``num_frames`` frames of a moving one.
        """
        config = self.config
        patch = config.patch_size
        grids = [(picture[0].shape[0] // patch, picture[0].shape[1] // patch) for picture in pictures]
        packing = pack(grids, config.merge_size, config.window)
        lens, numbers = [packing.full_lens], [packing.positions_P2]
        if packing.order_M is not None and packing.places_M is not None:
            lens.append(packing.window_lens)
            numbers += [packing.order_M, packing.places_M]
        if config.position_edge is not None:
            numbers.append(np.repeat(np.array(grids, dtype=np.int32), packing.full_lens, axis=0))
        return trunk.run(self._trunk, self._embed(pictures), lens, numbers)

    @abstractmethod
    def _trunk(self, x_PD: torch.Tensor, segments: Sequence[Segments], numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Patches in the pictures' own order to features in that order.

        Args:
            segments: pictures; windows, where there are any.
            numbers: row and column of each patch in its picture, in the packing's order; with windows, the features'
                order in the packing, and their places in it; with learned positions, rows and columns of that picture.
        """

    def in_passes(self, items: Sequence[Sequence[torch.Tensor]], steps: Sequence[int]) -> torch.Tensor:
        """The features of all items, in as few passes as can be.

        Args:
            items: each the frames of ``steps`` pictures, one after the other.
        """
        pictures: list[Sequence[torch.Tensor]] = []
        for item, count in zip(items, steps, strict=True):
            step = len(item) // count
            pictures += [item[i : i + step] for i in range(0, len(item), step)]
        area = self.config.patch_size**2
        return in_passes(self, pictures, [frames[0].shape[0] * frames[0].shape[1] // area for frames in pictures])

    def _embed(self, pictures: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Patches, (P, D), in the pictures' order; stills and frames each in one product."""
        patch = self.config.patch_size
        edge = patch * self.config.merge_size
        parts: dict[int, torch.Tensor] = {}
        for moves in (False, True):
            chosen = [i for i, picture in enumerate(pictures) if (len(picture) > 1) == moves]
            if not chosen:
                continue
            frames = [
                torch.cat([cut_blocks(frame, edge) for frame in views])
                for views in zip(*(pictures[i] for i in chosen), strict=True)
            ]
            x_PD = self.patch_embed([self.patches(frame_MYX3).flatten(0, 1) for frame_MYX3 in frames])
            if len(chosen) == len(pictures):
                return x_PD
            sizes = [pictures[i][0].shape[0] * pictures[i][0].shape[1] // patch**2 for i in chosen]
            parts |= dict(zip(chosen, x_PD.split(sizes), strict=True))
        return torch.cat([parts[i] for i in range(len(pictures))])

    def _rotary(self, positions_P2: torch.Tensor) -> Rotary:
        """The first half of each head's pairs turns with the row, the second with the column."""
        angles_PR = (positions_P2.unsqueeze(-1) * self.inverse_frequencies).flatten(1)
        return Rotary(angles_PR.cos(), angles_PR.sin())


class QwenTower(MergingTower):
    """Positions and windows where the config has them, a merger of two layers, and another for each deep layer."""

    def __init__(self, place: Placement, config: QwenViTConfig, norm: PixelNorm) -> None:
        super().__init__(place, config, norm)
        self.positions = None
        if config.position_edge is not None:
            self.positions = PositionGrid(place, config.position_edge, config.hidden_size)
        self.merger = PatchMerger(place, config)
        self.deep_mergers = nn.ModuleList(PatchMerger(place, config, norms_whole=True) for _ in config.deep_layers)

    def _trunk(self, x_PD: torch.Tensor, segments: Sequence[Segments], numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The order of the packing is undone behind the merger."""
        config = self.config
        positions_P2, *others = numbers
        places_M = None
        if config.window is not None:
            order_M, places_M, *others = others
            x_PD = x_PD.unflatten(0, (-1, config.merge_size**2)).index_select(0, order_M).flatten(0, 1)
        if self.positions is not None:
            x_PD = x_PD + self.positions(positions_P2, *others).to(x_PD.dtype)
        rotary = self._rotary(positions_P2)
        residual_PD = None
        deep: list[torch.Tensor] = []
        for number, block in enumerate(self.blocks):
            sees = segments[0 if number in config.full_layers else -1]
            x_PD, residual_PD = block(x_PD, residual_PD, rotary, sees)
            if number in config.deep_layers:
                deep.append(self.deep_mergers[len(deep)](x_PD, residual_PD))
        features_MD = torch.cat([self.merger(x_PD, residual_PD), *deep], dim=1)
        return features_MD if places_M is None else features_MD.index_select(0, places_M)


class PositionGrid(nn.Module):
    """Learned vectors on the points of a square, read between them where a picture has another number of patches: its
    corners lie on the square's."""

    def __init__(self, place: Placement, edge: int, hidden_size: int) -> None:
        super().__init__()
        self.edge = edge
        self.weight = place.parameter(edge**2, hidden_size)

    def forward(self, positions_P2: torch.Tensor, sizes_P2: torch.Tensor) -> torch.Tensor:
        """(P, D) in float32.

        Args:
            positions_P2: row and column of each patch in its picture.
            sizes_P2: rows and columns of that.
        """
        at_P2 = positions_P2.float() * (self.edge - 1) / (sizes_P2 - 1).clamp(min=1).float()
        low_P2 = at_P2.floor()
        far_P2 = at_P2 - low_P2  # of the way to the next point
        points_22P = torch.stack([low_P2, (low_P2 + 1).clamp(max=self.edge - 1)]).long().transpose(1, 2)
        shares_22P = torch.stack([1 - far_P2, far_P2]).transpose(1, 2)
        index_4P = (points_22P[:, None, 0] * self.edge + points_22P[:, 1]).flatten(0, 1)
        share_4P1 = (shares_22P[:, None, 0] * shares_22P[:, 1]).flatten(0, 1).unsqueeze(-1)
        first_PD, *others = (F.embedding(i, self.weight) * share for i, share in zip(index_4P, share_4P1, strict=True))
        return sum(others, first_PD)


class PatchEmbedding(Linear):
    """A convolution over ``num_frames`` frames. A still picture repeats one frame, so for it the frames' kernels are
    added up once, when the weights are packed: half the product, equal up to rounding."""

    def __init__(self, place: Placement, config: QwenViTConfig) -> None:
        shape = (config.hidden_size, 3, config.num_frames, config.patch_size, config.patch_size)
        in_features = 3 * config.num_frames * config.patch_size**2
        super().__init__(place, in_features, config.hidden_size, bias=config.patch_bias, checkpoint_shape=shape)
        self.shape = shape
        self.moving_weight: nn.Parameter | None = None

    def pack(self) -> None:
        weight = self.weight.view(self.shape)
        by_frame = weight.transpose(1, 2).flatten(1)
        self.moving_weight = nn.Parameter(self.kernels.pack_linear(by_frame.contiguous()), requires_grad=False)
        summed = weight.sum(dim=2, dtype=torch.float32).flatten(1)
        self.weight = nn.Parameter(summed.to(self.weight.dtype), requires_grad=False)
        super().pack()

    def forward(self, frames: Sequence[torch.Tensor]) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(P, D) of the patches of one still frame, or of ``num_frames`` frames, (P, 3 * patch_size**2) each."""
        if len(frames) == 1:
            return super().forward(frames[0])
        assert self.moving_weight is not None
        return self.kernels.linear(torch.cat(tuple(frames), dim=1), self.moving_weight, self.bias)


class QwenViTBlock(nn.Module):
    def __init__(self, place: Placement, config: QwenViTConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.norm1 = _norm(place, config)
        self.attn = PatchAttention(
            place, size, config.num_heads, qkv_bias=config.qkv_bias, output_bias=config.output_bias
        )
        self.norm2 = _norm(place, config)
        if config.is_gated:
            self.mlp = GatedMLP(place, size, inner, config.hidden_act, bias=config.output_bias)
        else:
            self.mlp = MLP(place, size, inner, config.hidden_act)

    def forward(
        self, x_PD: torch.Tensor, residual_PD: torch.Tensor | None, rotary: Rotary, segments: Segments
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns (what this block adds, what it is added to), so that add and norm are one kernel."""
        x_PD, sum_PD = self.attn(self.norm1, x_PD, residual_PD, segments, rotary)
        return self.mlp.normed(self.norm2, x_PD, sum_PD)


class PatchMerger(nn.Module):
    """The patches of one feature side by side, through two linear layers, to the decoder's width.

    Args:
        norms_whole: they are normed together, not each by itself.
    """

    def __init__(self, place: Placement, config: QwenViTConfig, *, norms_whole: bool = False) -> None:
        super().__init__()
        self.norms_whole = norms_whole
        self.area = config.merge_size**2
        width = config.hidden_size * self.area
        self.ln_q = LayerNorm(place, width, config.norm_eps) if norms_whole else _norm(place, config)
        self.linear_1 = Linear(place, width, width, bias=True)
        self.linear_2 = Linear(place, width, config.out_size, bias=True)

    def forward(self, x_PD: torch.Tensor, residual_PD: torch.Tensor | None) -> torch.Tensor:
        if self.norms_whole:
            x_PD = x_PD if residual_PD is None else x_PD + residual_PD
            x_MD = normed(self.ln_q, x_PD.unflatten(0, (-1, self.area)).flatten(1))
        else:
            x_MD = added(self.ln_q, x_PD, residual_PD)[0].unflatten(0, (-1, self.area)).flatten(1)
        return self.linear_2.activated(self.linear_1(x_MD), "gelu")


def _norm(place: Placement, config: QwenViTConfig) -> LayerNorm | RMSNorm:
    kind = RMSNorm if config.is_gated else LayerNorm
    return kind(place, config.hidden_size, config.norm_eps)
