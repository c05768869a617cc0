"""Linear layers together with what is ahead of them, in every form of weight."""

from __future__ import annotations

import pytest
import torch

from opsin.kernels import reference
from opsin.kernels.quantized import FP8, INT8, quantize_weight
from opsin.layers import Placement
from opsin.layers.linear import Linear
from opsin.layers.mlp import MLP, GatedMLP
from opsin.layers.norm import LayerNorm, RMSNorm, added

KINDS = pytest.mark.parametrize("kind", [None, FP8, INT8], ids=str)
NORMS = pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
PLACE = Placement(reference.KERNELS, torch.device("cpu"), torch.bfloat16, defers_linears=True)


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(module: torch.nn.Module, kind: torch.dtype | None) -> None:
    for seed, part in enumerate(module.modules()):
        if isinstance(part, Linear):
            part.allocate(kind)
            weight = rand(*part.weight.shape, seed=seed) * part.weight.shape[1] ** -0.5
            if kind is not None and part.weight_scale is not None:
                weight, scale = quantize_weight(weight, kind)
                part.weight_scale.copy_(scale.squeeze(1))
            part.weight.copy_(weight)
            if part.bias is not None:
                part.bias.copy_(rand(len(part.bias), seed=seed + 10))
        elif isinstance(part, RMSNorm | LayerNorm):
            part.weight.copy_(rand(len(part.weight), seed=seed + 20))
            if isinstance(part, LayerNorm):
                part.bias.copy_(rand(len(part.bias), seed=seed + 30))


@torch.no_grad()
@KINDS
@NORMS
def test_layers_equal_their_steps_one_by_one(kind: torch.dtype | None, norm: type[RMSNorm | LayerNorm]):
    ahead, linear = norm(PLACE, 32, 1e-6), Linear(PLACE, 32, 48, bias=True)
    for module in (ahead, linear):
        fill(module, kind)
    x, residual = rand(5, 32, seed=1).bfloat16(), rand(5, 32, seed=2).bfloat16()
    for given in (None, residual):
        normed, total = added(ahead, x, given)
        y, got_total = linear.normed(ahead, x, given)
        assert torch.equal(got_total, total)
        assert torch.equal(y, linear(normed))
        gated, _ = linear.normed(ahead, x, given, gate="silu")
        assert torch.equal(gated, reference.gated_activation(linear(normed), "silu"))
    assert torch.equal(linear.activated(x, "gelu"), linear(reference.activation(x, "gelu")))
    wide = torch.cat((x, residual), dim=1)
    assert torch.equal(linear.gated(wide, "silu"), linear(reference.gated_activation(wide, "silu")))


@torch.no_grad()
@KINDS
@NORMS
def test_feed_forward_blocks_equal_their_steps_one_by_one(kind: torch.dtype | None, norm: type[RMSNorm | LayerNorm]):
    ahead, plain, gated = norm(PLACE, 32, 1e-6), MLP(PLACE, 32, 64, "gelu"), GatedMLP(PLACE, 32, 64, "silu", bias=True)
    for module in (ahead, plain, gated):
        fill(module, kind)
    x, residual = rand(5, 32, seed=1).bfloat16(), rand(5, 32, seed=2).bfloat16()
    normed, total = added(ahead, x, residual)
    expected = (
        plain.fc2(reference.activation(plain.fc1(normed), "gelu")),
        gated.down_proj(reference.gated_activation(gated.gate_up_proj(normed), "silu")),
    )
    for block, y in zip((plain, gated), expected, strict=True):
        got, got_total = block.normed(ahead, x, residual)
        assert torch.equal(got_total, total)
        assert torch.equal(got, y)
