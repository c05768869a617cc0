"""One engine, driven from a terminal: an answer is streamed while it grows, and Ctrl-C stops the answer alone."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
import typing
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import opsin
from opsin.cli.flags import add_option
from opsin.params import SamplingParams

T = TypeVar("T")

# What a picture says can end up in the answer; it must not steer the reader's terminal.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_SAMPLING_HELP = {
    "max_tokens": "Longest answer, in tokens.",
    "temperature": "0 always takes the likeliest token; more is more varied.",
    "top_p": "Sample among the likeliest tokens whose probabilities add up to this.",
    "top_k": "Sample among this many tokens; 0 is all.",
    "min_p": "Sample among tokens at least this likely, relative to the likeliest.",
    "repetition_penalty": "Above 1 makes tokens that were seen already less likely.",
}
_SAMPLING_DEFAULTS = {"max_tokens": 256, "temperature": 0.0}


class Answer(NamedTuple):
    """What came back, and how fast.

    ``media_tokens`` of the prompt stand for pictures; ``decode_s`` is the engine's time from first to last token.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    media_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float
    decode_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token; None for answers of a single token."""
        if self.completion_tokens < 2 or self.decode_s <= 0:
            return None
        return (self.completion_tokens - 1) / self.decode_s

    def summary(self) -> str:
        """One line for a person."""
        pictures = f", {self.media_tokens} of them pictures" if self.media_tokens else ""
        cached = f", {self.cached_tokens} cached" if self.cached_tokens else ""
        speed = f", {self.tokens_per_s:.1f} tokens/s" if self.tokens_per_s else ""
        return (
            f"{self.prompt_tokens} prompt tokens{pictures}{cached} | first token after {self.ttft_s:.3f} s | "
            f"{self.completion_tokens} answer tokens{speed}"
        )


class Session:
    """An ``AsyncLLM`` and the event loop it lives on, for as long as the command runs.

    Use as a context manager: leaving it shuts the engine down.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._ids = itertools.count()
        self.llm = opsin.AsyncLLM(**settings)  # on no event loop, which would hold Ctrl-C back until it is loaded
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.shutdown()
        self._runner.close()

    def ask(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, on_text: Callable[[str], None]
    ) -> Answer:
        """Stream one answer.

        Args:
            on_text: called with each new piece of text.

        Raises:
            KeyboardInterrupt: Ctrl-C; the request is aborted and the session can be used again.
        """
        return self.call(self._ask(messages, params, on_text))

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's event loop."""
        return self._runner.run(work)

    async def _ask(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, on_text: Callable[[str], None]
    ) -> Answer:
        request_id = f"cli-{next(self._ids)}"
        started = time.perf_counter()
        first: float | None = None
        shown = ""
        output = None
        try:
            async for output in self.llm.chat(list(messages), params, request_id=request_id):
                completion = output.outputs[0]
                if first is None and completion.token_ids:
                    first = time.perf_counter()
                if len(completion.text) > len(shown):
                    on_text(completion.text[len(shown) :])
                    shown = completion.text
        except asyncio.CancelledError:
            await self.llm.abort(request_id)
            raise
        assert output is not None, "a stream without a single output"
        finished = time.perf_counter()
        completion, metrics = output.outputs[0], output.metrics
        decode_s = 0.0
        if metrics is not None and metrics.first_token_time is not None and metrics.last_token_time is not None:
            decode_s = metrics.last_token_time - metrics.first_token_time
        return Answer(
            text=completion.text,
            finish_reason=completion.finish_reason or "",
            prompt_tokens=len(output.prompt_token_ids),
            media_tokens=output.num_media_tokens,
            cached_tokens=output.num_cached_tokens,
            completion_tokens=len(completion.token_ids),
            ttft_s=(first or finished) - started,
            decode_s=decode_s,
            total_s=finished - started,
        )


def print_piece(text: str) -> None:
    """Print a part of an answer at once; on a terminal, without control characters."""
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that shape one answer."""
    section = parser.add_argument_group("answer")
    hints = typing.get_type_hints(SamplingParams)
    standard = SamplingParams()
    for name, help in _SAMPLING_HELP.items():
        add_option(section, name, hints[name], help, _SAMPLING_DEFAULTS.get(name, getattr(standard, name)))


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The parameters that were asked for.

    Raises:
        RequestError: one is out of range.
    """
    given = {name: value for name, value in vars(args).items() if name in _SAMPLING_HELP}
    return SamplingParams(**{**_SAMPLING_DEFAULTS, **given})
