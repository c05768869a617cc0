"""The language model that families share; what it computes is compared with transformers' in theirs."""

from __future__ import annotations

import pytest
import torch

from opsin.kernels import reference
from opsin.layers import Placement
from opsin.models.decoder import Decoder, DecoderConfig

QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 3000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA2 = QWEN2 | {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 3.0}


@pytest.mark.parametrize(
    ("config", "dtype"), [(QWEN2, torch.bfloat16), (GEMMA2, torch.float32)], ids=["qwen2", "gemma2"]
)
@torch.inference_mode()
def test_ranking_orders_as_logits_do_and_is_widened_only_where_it_is_bent(
    config: dict[str, object], dtype: torch.dtype
):
    draw = torch.Generator().manual_seed(0)
    decoder = Decoder(Placement(reference.KERNELS, torch.device("cpu"), torch.bfloat16), DecoderConfig.from_hf(config))
    decoder.lm_head.weight.normal_(generator=draw)
    hidden = torch.randn(40, 32, generator=draw, dtype=torch.bfloat16)
    hidden[3, 5] = float("nan")
    ranking, logits = decoder.ranking(hidden), decoder.logits(hidden)
    assert ranking.dtype == dtype
    assert torch.equal(ranking.isfinite(), logits.isfinite())
    kept = [row for row in range(40) if row != 3]
    assert torch.equal(ranking.argsort(stable=True)[kept], logits.argsort(stable=True)[kept])
