"""Kernels that start before those ahead have ended compute what they compute one after the other."""

from __future__ import annotations

import pytest
import torch

from opsin.kernels import select
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.triton import overlap
from opsin.layers import Placement
from opsin.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.gpu

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
PAGE, LONGEST = 16, 512
CONFIG = {  # a few layers of Qwen2-VL-2B
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}


class Steps:
    """Decode steps of some rows, captured and replayed, each fed with what the one before it returned."""

    def __init__(self, decoder: Decoder, rows: int) -> None:
        shape = (rows * LONGEST // PAGE, PAGE, 2, 128)
        self.caches = [LayerCache(*torch.zeros(2, *shape, device=DEVICE, dtype=DTYPE)) for _ in decoder.layers]
        tables_BL = torch.arange(shape[0], device=DEVICE, dtype=torch.int32).view(rows, -1)
        self.kept = tables_BL  # a graph keeps nothing alive that it reads
        self.first_BD = torch.randn(rows, 1536, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
        self.hidden_BD = self.first_BD.clone()
        self.position_B = torch.zeros(rows, device=DEVICE, dtype=torch.int64)

        def step() -> None:
            slots_B = tables_BL.long().gather(1, self.position_B[:, None] // PAGE)[:, 0] * PAGE + self.position_B % PAGE
            inputs = AttentionInputs(
                query_start_B1=torch.arange(rows + 1, device=DEVICE, dtype=torch.int32),
                context_lens_B=(self.position_B + 1).int(),
                block_tables_BL=tables_BL,
                slot_mapping_T=slots_B,
                query_lens=(1,) * rows,
                context_lens=(LONGEST,) * rows,
            )
            hidden_BD = decoder(self.hidden_BD.clone(), self.position_B[None], inputs, self.caches)
            drawn_2B = decoder.lm_head.kernels.greedy(decoder.logits(hidden_BD))
            self.hidden_BD.copy_(hidden_BD + decoder.embed_tokens(drawn_2B[0]))
            self.position_B += 1

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def run(self, count: int) -> torch.Tensor:
        self.hidden_BD.copy_(self.first_BD)
        self.position_B.zero_()
        results = []
        for _ in range(count):
            self.graph.replay()
            results.append(self.hidden_BD.clone())
        return torch.stack(results)


@pytest.mark.parametrize("rows", [1, 5])
@torch.inference_mode()
def test_steps_that_overlap_return_what_they_return_apart(rows: int, monkeypatch: pytest.MonkeyPatch):
    if not overlap.can_overlap(DEVICE):
        pytest.skip("this GPU starts no kernel early")
    draw = torch.Generator("cuda").manual_seed(0)
    decoder = Decoder(Placement(select(DEVICE, "triton"), DEVICE, DTYPE), DecoderConfig.from_hf(CONFIG))
    for weight in decoder.parameters():
        weight.normal_(std=0.5 if weight.dim() == 1 else weight.shape[1] ** -0.5, generator=draw)
    together = Steps(decoder, rows)
    monkeypatch.setattr(overlap, "capability", lambda device: (8, 0))
    apart = Steps(decoder, rows).run(LONGEST)
    assert apart.isfinite().all()
    for _ in range(4):  # what is read too early is read so at times
        assert torch.equal(together.run(LONGEST), apart)
