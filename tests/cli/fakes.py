"""A stand-in for ``AsyncLLM``: the commands are tested for what they send and print, not for what a model says."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from opsin.errors import OpsinError
from opsin.outputs import RequestMetrics
from opsin.params import SamplingParams
from opsin.runner.executor import MemoryPlan

MEMORY = MemoryPlan(
    total_bytes=1000,
    weight_bytes=10,
    kv_bytes=20,
    feature_bytes=30,
    peak_step_bytes=40,
    num_blocks=5,
    block_size=16,
)


class Completion(NamedTuple):
    text: str
    token_ids: list[int]
    finish_reason: str | None


class Output(NamedTuple):
    prompt_token_ids: list[int]
    num_media_tokens: int
    num_cached_tokens: int
    outputs: list[Completion]
    finished: bool
    metrics: RequestMetrics


class FakeLLM:
    """Answers with ``words``, one per output, cumulatively; records what it was asked."""

    words = ("A ", "red ", "circle.")
    error: OpsinError | None = None
    interrupt_after: int | None = None  # outputs after which Ctrl-C is pressed

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.memory_plan = MEMORY
        self.asked: list[tuple[list[dict[str, Any]], SamplingParams]] = []
        self.aborted: list[str] = []
        self.is_shut_down = False
        FakeLLM.last = self

    last: FakeLLM

    async def chat(
        self, messages: list[dict[str, Any]], sampling_params: SamplingParams, *, request_id: str
    ) -> AsyncIterator[Output]:
        self.asked.append((messages, sampling_params))
        if self.error is not None:
            raise self.error
        for index in range(len(self.words)):
            await asyncio.sleep(0)
            if index == self.interrupt_after:
                signal.raise_signal(signal.SIGINT)  # what the terminal's Ctrl-C does
                await asyncio.sleep(0)
            text = "".join(self.words[: index + 1])
            is_last = index == len(self.words) - 1
            completion = Completion(text, list(range(index + 1)), "stop" if is_last else None)
            yield Output(
                [7] * 20, 16, 4, [completion], is_last, RequestMetrics(0.0, first_token_time=1.0, last_token_time=1.5)
            )

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def shutdown(self) -> None:
        self.is_shut_down = True
