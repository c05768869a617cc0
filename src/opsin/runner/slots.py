"""What the runner remembers of every request between steps: one slot each, in tables indexed by slot.

Token ids live on the device, because a step's sampled ids are the next step's inputs before the host has seen them.
Block tables and the rest live on the host, where each step's inputs are assembled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from opsin.params import PoolingParams, SamplingParams
from opsin.types import SlotOpen


@dataclass(slots=True)
class Slot:
    """One request's unchanging facts.

    ``positions_AP`` are its prompt's rotary positions when they are not sequential.
    """

    num_prompt_tokens: int
    params: SamplingParams | PoolingParams
    seed: int
    stop_token_ids: frozenset[int]
    prompt_token_ids: list[int]
    bidirectional: list[tuple[int, int]]
    positions_AP: np.ndarray | None
    position_delta: int
    num_blocks: int = 0


class SlotTable:
    """Slots 0 to ``max_num_seqs`` - 1."""

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, num_axes: int, device: torch.device
    ) -> None:
        self.slots: list[Slot | None] = [None] * max_num_seqs
        self.tokens_SL = torch.zeros(max_num_seqs, max_model_len + 1, dtype=torch.int64, device=device)
        self.blocks_SL = np.zeros((max_num_seqs, -(-max_model_len // block_size) + 1), dtype=np.int32)
        self.num_axes = num_axes

    def open(self, opened: SlotOpen) -> None:
        """Replace whatever the slot held by a request, prompt and known answer included."""
        positions = None
        if opened.positions is not None:
            positions = np.frombuffer(opened.positions, dtype=np.int32).reshape(self.num_axes, -1)
        self.slots[opened.slot] = Slot(
            num_prompt_tokens=opened.num_prompt_tokens,
            params=opened.params,
            seed=opened.seed,
            stop_token_ids=opened.stop_token_ids,
            prompt_token_ids=opened.token_ids[: opened.num_prompt_tokens],
            bidirectional=opened.bidirectional,
            positions_AP=positions,
            position_delta=opened.position_delta,
        )
        ids = torch.tensor(opened.token_ids, dtype=torch.int64)
        self.tokens_SL[opened.slot, : len(opened.token_ids)] = ids.to(self.tokens_SL.device, non_blocking=True)

    def append_blocks(self, slot: int, blocks: tuple[int, ...]) -> None:
        state = self[slot]
        self.blocks_SL[slot, state.num_blocks : state.num_blocks + len(blocks)] = blocks
        state.num_blocks += len(blocks)

    def __getitem__(self, slot: int) -> Slot:
        state = self.slots[slot]
        assert state is not None, f"slot {slot} was never opened"
        return state
