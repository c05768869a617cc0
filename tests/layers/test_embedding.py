from __future__ import annotations

import torch
from torch import nn

from opsin.kernels import reference
from opsin.layers import Placement
from opsin.layers.embedding import LMHead, TokenEmbedding
from opsin.models.weights import pack


def test_tied_head_that_needs_no_packing_stays_one_parameter():
    place = Placement(reference.KERNELS, torch.device("cpu"), torch.float32)
    embedding = TokenEmbedding(place, 10, 4)
    model = nn.ModuleList([embedding, LMHead(place, 4, 10, tied_to=embedding)])
    pack(model)
    assert sum(p.numel() for p in model.parameters()) == 40
