"""What the scheduler may hand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Concrete numbers, resolved from the configuration and the measured memory plan.

    Attributes:
        max_num_seqs: requests that run at once; also the number of slots.
        max_num_batched_tokens: tokens per step.
        max_num_batched_patches: vision patches per step.
        max_num_tokens_beside_decodes: prompt tokens of a step in which somebody else's answer goes on; None for as
            many as there are.
        max_num_patches_beside_decodes: likewise, vision patches.
        max_model_len: prompt plus answer, in tokens.
        num_blocks: KV blocks, the scratch block 0 included.
        feature_bytes: capacity of the vision-feature cache.
        feature_row_bytes: bytes of one feature row.
        pixel_bytes: budget of payloads asked for and not yet encoded.
        encodes_beside: payloads come encoded, beside the steps; they weigh what their features do.
        max_raw_pixels: of pictures that the device resizes, which therefore come as they are; 0 where it does not.
        pipeline_depth: steps planned and not yet committed.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_patches: int
    max_model_len: int
    num_blocks: int
    block_size: int
    feature_bytes: int
    feature_row_bytes: int
    pixel_bytes: int
    policy: Literal["fcfs", "priority"] = "fcfs"
    pipeline_depth: int = 1
    max_num_tokens_beside_decodes: int | None = None
    max_num_patches_beside_decodes: int | None = None
    enable_prefix_caching: bool = True
    encodes_beside: bool = False
    max_raw_pixels: int = 0

    @property
    def context_len(self) -> int:
        """Most tokens one request can have: the model's limit, or all blocks of the pool."""
        return min(self.max_model_len, (self.num_blocks - 1) * self.block_size)

    def step_budget(self, has_decodes: bool) -> tuple[int, int]:
        """Prompt tokens and vision patches that a step may take on, with or without answers that go on."""
        tokens, patches = self.max_num_batched_tokens, self.max_num_batched_patches
        if has_decodes:
            tokens = min(tokens, self.max_num_tokens_beside_decodes or tokens)
            patches = min(patches, self.max_num_patches_beside_decodes or patches)
        return tokens, patches
