"""The vision tower of GLM-4.1V (arXiv:2507.01006; HF ``Glm4vVisionModel``): Qwen2.5-VL's blocks between norms, learned
positions that are read between by cubic curves, and a convolution and a gated MLP that merge patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from opsin.layers import Placement
from opsin.layers.linear import Linear, MergedLinear
from opsin.layers.norm import LayerNorm, RMSNorm, normed
from opsin.models.projector import MergingLinear
from opsin.models.rule import PixelNorm
from opsin.models.towers.attention import Segments
from opsin.models.towers.qwen_vit import RENAMES as _RENAMES
from opsin.models.towers.qwen_vit import MergingTower, QwenViTConfig

_CURVE = -0.75  # the slope of torch's cubic curves
_MERGER_EPS = 1e-5  # torch's own for a LayerNorm
RENAMES = (*_RENAMES, (r"^tower\.embeddings\.position_embedding\.", "tower.positions."))


class GlmTower(MergingTower):
    """Of a config as ``QwenViTConfig.from_glm4v`` reads it."""

    def __init__(self, place: Placement, config: QwenViTConfig, norm: PixelNorm) -> None:
        super().__init__(place, config, norm)
        assert config.position_edge is not None
        size = config.hidden_size
        self.post_conv_layernorm = RMSNorm(place, size, config.norm_eps)
        self.positions = CubicPositionGrid(place, config.position_edge, size)
        self.post_layernorm = RMSNorm(place, size, config.norm_eps)
        self.downsample = MergingLinear(place, size, config.merge_size, config.out_size, bias=True, is_convolution=True)
        self.merger = GatedMerger(place, config)

    def _trunk(self, x_PD: torch.Tensor, segments: Sequence[Segments], numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        positions_P2, sizes_P2 = numbers
        x_PD = normed(self.post_conv_layernorm, x_PD)
        x_PD = x_PD + self.positions(positions_P2, sizes_P2).to(x_PD.dtype)
        rotary = self._rotary(positions_P2)
        residual_PD = None
        for block in self.blocks:
            x_PD, residual_PD = block(x_PD, residual_PD, rotary, segments[0])
        x_PD, _ = self.post_layernorm(x_PD, residual_PD)
        return self.merger(self.downsample(x_PD.unflatten(0, (-1, self.config.merge_size**2)).flatten(1)))


class CubicPositionGrid(nn.Module):
    """Learned vectors on the points of a square, read between them by cubic curves (Keys, 1981) through four points
    each way. A picture covers the whole square, its patches equal parts of it, and beyond its edge is as on it.

    All patches are one product of what they take of each point, most of it nothing, and the points: little work beside
    one of the tower's layers, and no value is looked up sixteen times.
    """

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
        middles_P2 = (positions_P2.float() + 0.5) / sizes_P2.clamp(min=1).float()
        shares_P2E = self._shares(middles_P2 * self.edge - 0.5)
        shares_PEE = shares_P2E[:, 0].unsqueeze(2) * shares_P2E[:, 1].unsqueeze(1)
        return shares_PEE.flatten(1) @ self.weight.float()

    def _shares(self, at_P2: torch.Tensor) -> torch.Tensor:
        """How much each point of a side counts at these places, (P, 2, edge)."""
        low_P2 = at_P2.floor()
        far_P2 = at_P2 - low_P2  # of the way to the next point
        steps_4 = torch.arange(-1, 3, device=at_P2.device)
        distances_P24 = (far_P2.unsqueeze(-1) - steps_4).abs()
        points_P24 = (low_P2.unsqueeze(-1) + steps_4).clamp(0, self.edge - 1)
        is_point_P24E = points_P24.unsqueeze(-1) == torch.arange(self.edge, device=at_P2.device)
        return (_cubic(distances_P24).unsqueeze(-1) * is_point_P24E).sum(2)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """What a point at distance ``x``, at most 2, counts."""
    near = ((_CURVE + 2) * x - (_CURVE + 3)) * x * x + 1
    far = ((_CURVE * x - 5 * _CURVE) * x + 8 * _CURVE) * x - 4 * _CURVE
    return torch.where(x <= 1, near, far)


class GatedMerger(nn.Module):
    """Linear, norm and GELU, then a gated MLP."""

    def __init__(self, place: Placement, config: QwenViTConfig) -> None:
        super().__init__()
        assert config.merger_size is not None
        size, inner = config.out_size, config.merger_size
        self.act = config.hidden_act
        self.proj = Linear(place, size, size, bias=False)
        self.post_projection_norm = LayerNorm(place, size, _MERGER_EPS)
        self.gate_up_proj = MergedLinear(place, size, {"gate_proj": inner, "up_proj": inner}, bias=False)
        self.down_proj = Linear(place, inner, size, bias=False, shard="in")

    def forward(self, x_MD: torch.Tensor) -> torch.Tensor:
        normed_MD = self.post_projection_norm(self.proj(x_MD))
        return self.down_proj.gated(self.gate_up_proj.activated(normed_MD, "gelu"), self.act)
