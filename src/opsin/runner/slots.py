"""What the runner remembers of every request between steps: one slot each, in tables indexed by slot.

Token ids live on the device, because a step's sampled ids are the next step's inputs before the host has seen them.
Block tables live on both sides: the host says where new keys go, attention reads where old ones are. The rest lives on
the host, where each step's inputs are assembled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from opsin.layers.staging import upload
from opsin.params import PoolingParams, SamplingParams
from opsin.runner.sampler import NUMBERS, is_particular, is_plain, numbers_of
from opsin.types import SlotOpen


@dataclass(slots=True)
class Slot:
    """One request's unchanging facts.

    ``positions_AP`` are its prompt's rotary positions when they are not sequential. ``prompt_token_ids`` are kept for a
    prompt that is scored alone.
    """

    params: SamplingParams | PoolingParams
    stop_token_ids: frozenset[int]
    prompt_token_ids: list[int]
    bidirectional: list[tuple[int, int]]
    positions_AP: np.ndarray | None
    num_blocks: int = 0


class SlotTable:
    """Slots 0 to ``max_num_seqs`` - 1.

    Attributes:
        blocks_SL: int32; entries past a slot's own blocks may be a former tenant's.
        device_blocks_SL: the same on the device, once ``take_new_blocks`` is written to it.
        num_prompt_S: prompt lengths.
        delta_S: what is added to the index of a generated token to make its rotary position.
        is_plain_S: the request takes the likeliest token and asks for nothing else (``sampler.is_plain``).
        is_particular_S: its rows must be looked at one by one (``sampler.is_particular``).
        numbers_S: what the sampler must know of it otherwise.
    """

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, num_axes: int, device: torch.device
    ) -> None:
        self.slots: list[Slot | None] = [None] * max_num_seqs
        self.tokens_SL = torch.zeros(max_num_seqs, max_model_len + 1, dtype=torch.int64, device=device)
        self.blocks_SL = np.zeros((max_num_seqs, -(-max_model_len // block_size) + 1), dtype=np.int32)
        self.device_blocks_SL = torch.from_numpy(self.blocks_SL)  # on a CPU the same memory
        if device.type != "cpu":
            self.device_blocks_SL = self.device_blocks_SL.to(device)
        self.num_axes = num_axes
        self.num_prompt_S = np.zeros(max_num_seqs, dtype=np.int64)
        self.delta_S = np.zeros(max_num_seqs, dtype=np.int64)
        self.is_plain_S = np.zeros(max_num_seqs, dtype=bool)
        self.is_particular_S = np.zeros(max_num_seqs, dtype=bool)
        self.numbers_S = np.zeros(max_num_seqs, dtype=NUMBERS)
        self._new_at: list[int] = []  # flat places in the block table that the device has not seen
        self._new_blocks: list[int] = []

    def open(self, opened: SlotOpen) -> None:
        """Replace whatever the slot held by a request, prompt and known answer included."""
        positions = None
        if opened.positions is not None:
            positions = np.frombuffer(opened.positions, dtype=np.int32).reshape(self.num_axes, -1)
        params = opened.params
        scores_prompt = isinstance(params, SamplingParams) and params.prompt_logprobs is not None
        self.slots[opened.slot] = Slot(
            params=params,
            stop_token_ids=opened.stop_token_ids,
            prompt_token_ids=opened.token_ids[: opened.num_prompt_tokens] if scores_prompt else [],
            bidirectional=opened.bidirectional,
            positions_AP=positions,
        )
        self.num_prompt_S[opened.slot] = opened.num_prompt_tokens
        self.delta_S[opened.slot] = 0 if positions is None else opened.position_delta
        self.is_plain_S[opened.slot] = is_plain(params, opened.stop_token_ids)
        self.is_particular_S[opened.slot] = is_particular(params, opened.stop_token_ids)
        if isinstance(params, SamplingParams):
            self.numbers_S[opened.slot] = numbers_of(params, opened.num_prompt_tokens, opened.seed)
        (ids,) = upload([np.array(opened.token_ids, dtype=np.int64)], self.tokens_SL.device)
        self.tokens_SL[opened.slot, : len(opened.token_ids)] = ids

    def append_blocks(self, slot: int, blocks: tuple[int, ...]) -> None:
        state = self[slot]
        self.blocks_SL[slot, state.num_blocks : state.num_blocks + len(blocks)] = blocks
        if self.device_blocks_SL.device.type != "cpu":
            first = slot * self.blocks_SL.shape[1] + state.num_blocks
            self._new_at += range(first, first + len(blocks))
            self._new_blocks += blocks
        state.num_blocks += len(blocks)

    def take_new_blocks(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(int64 flat places, int32 blocks) to be written to ``device_blocks_SL``; None when it is up to date."""
        if not self._new_at:
            return None
        # A slot may have changed hands within one step; of two blocks for one place the later counts.
        latest = dict(zip(self._new_at, self._new_blocks, strict=True))
        self._new_at, self._new_blocks = [], []
        places, blocks = np.fromiter(latest.keys(), np.int64), np.fromiter(latest.values(), np.int32)
        return places, blocks

    def __getitem__(self, slot: int) -> Slot:
        state = self.slots[slot]
        assert state is not None, f"slot {slot} was never opened"
        return state
