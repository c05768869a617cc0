"""A plan in the making: what a step has taken on, and what it may still take on."""

from __future__ import annotations

from opsin.cache.features import FeatureCache
from opsin.scheduler.sequence import Sequence
from opsin.types import RowPlan, SlotOpen


class Step:
    """One step while it is planned.

    Args:
        num_tokens: the most it may hold.
        num_prefill_tokens: of them, the most that belong to prompts.
        now_s: when it is planned.
    """

    def __init__(self, num_tokens: int, num_prefill_tokens: int, now_s: float) -> None:
        self.num_tokens_left, self.num_prefill_left, self.now_s = num_tokens, num_prefill_tokens, now_s
        self.opened: list[SlotOpen] = []
        self.decodes: list[tuple[Sequence, RowPlan]] = []
        self.prefills: list[tuple[Sequence, RowPlan]] = []
        self.has_preempted = False

    @property
    def is_full(self) -> bool:
        """No prompt can start in it."""
        return self.num_tokens_left <= 0 or self.num_prefill_left <= 0

    def chunk(self, seq: Sequence, features: FeatureCache, budget: int) -> int:
        """How many positions of a prompt to compute, at most ``budget``; may be <= 0."""
        preferred = min(budget, self.num_prefill_left)
        num_tokens = seq.chunk(features, preferred)
        if num_tokens <= 0 and not self.prefills:
            # A range that sees itself both ways is computed whole. Each step lets one in, or it would wait for ever.
            across = seq.range_across(seq.num_computed + preferred)
            if across is not None:
                num_tokens = seq.chunk(features, min(budget, across[1] - seq.num_computed))
        return num_tokens

    def open(self, seq: Sequence) -> None:
        """Tell the runner of a request that has got a slot, and all that it may need of it there."""
        assert seq.slot is not None
        request = seq.request
        self.opened.append(
            SlotOpen(
                slot=seq.slot,
                token_ids=list(seq.tokens),
                num_prompt_tokens=seq.num_prompt,
                params=request.params,
                seed=request.seed,
                positions=request.positions,
                position_delta=request.position_delta,
                bidirectional=request.bidirectional,
                stop_token_ids=request.stop_token_ids,
            )
        )

    def add(self, seq: Sequence, row: RowPlan) -> None:
        """Take a row on."""
        self.num_tokens_left -= row.num_tokens
        if row.num_tokens > 1 or row.start < seq.num_prompt:
            self.num_prefill_left -= row.num_tokens
        (self.decodes if row.num_tokens == 1 and not row.features else self.prefills).append((seq, row))
