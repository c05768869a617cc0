"""Token embedding and language-model head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from opsin.layers import Placement
from opsin.layers.linear import Linear


class TokenEmbedding(nn.Module):
    """
    Args:
        scale: what embeddings are multiplied by, rounded to their dtype as transformers rounds it. A tied head takes
            the weight without it.
    """

    def __init__(self, place: Placement, vocab_size: int, hidden_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = place.parameter(vocab_size, hidden_size)
        self.scale = torch.tensor(scale, device="cpu").to(place.dtype).item()

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        embedded_TD = F.embedding(ids_T, self.weight)
        return embedded_TD if self.scale == 1.0 else embedded_TD * self.scale


class LMHead(Linear):
    """Hidden states to logits. A tied head shares the embedding's weight and has none of its own to load."""

    may_be_quantized = False

    def __init__(
        self, place: Placement, hidden_size: int, vocab_size: int, *, tied_to: TokenEmbedding | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.kernels = place.kernels
        self.shard = "out"
        self.checkpoint_shape, self.num_spare_inputs = None, 0
        self.is_tied = tied_to is not None
        self.weight = place.parameter(vocab_size, hidden_size) if tied_to is None else tied_to.weight
        self.weight_scale = None
        self.bias = None
