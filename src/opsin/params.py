"""What a caller may ask of one request: ``SamplingParams``, ``PoolingParams``, ``BeamSearchParams``.

Names, defaults and meanings are vLLM's (and OpenAI's where vLLM follows it). Unknown names raise.
"""

# Values come from callers and files, so they are checked whatever their types promise.
# pyright: reportUnnecessaryIsInstance=false, reportUnnecessaryComparison=false

from __future__ import annotations

import math
from typing import Literal

import msgspec

from opsin.errors import RequestError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_TOKEN_LIST = 4096


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to turn logits into an answer.

    Attributes:
        n: answers per prompt; they share the prompt's cache blocks.
        temperature: 0 is greedy.
        top_k: 0 or -1 keeps the whole vocabulary.
        max_tokens: None means as many as the context holds.
        seed: makes the answer reproducible whatever else is in the batch.
        logprobs: how many alternatives to report per token; 0 reports the chosen token alone.
        logit_bias: token id to a value in [-100, 100] added to its logit.
        bad_words: strings that must not be produced.
        detokenize: False skips text, so stop strings cannot be used either.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    bad_words_token_ids: list[list[int]] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # OpenAI allows a bare string
            self.stop = [self.stop]
        elif self.stop is None:
            self.stop = []
        self._require(isinstance(self.n, int) and 1 <= self.n <= MAX_N, "n", f"between 1 and {MAX_N}")
        self._finite("temperature", 0.0, 100.0)
        self._finite("top_p", 0.0, 1.0)
        self._require(self.top_p > 0.0, "top_p", "above 0 and at most 1")
        self._require(isinstance(self.top_k, int) and self.top_k >= -1, "top_k", "-1, 0 or positive")
        self._finite("min_p", 0.0, 1.0)
        self._finite("presence_penalty", -2.0, 2.0)
        self._finite("frequency_penalty", -2.0, 2.0)
        self._finite("repetition_penalty", 1e-6, 1e6)
        self._require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1, or None")
        self._require(self.min_tokens >= 0, "min_tokens", "at least 0")
        if self.max_tokens is not None:
            self._require(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens={self.max_tokens}")
        self._require(
            len(self.stop) <= MAX_STOP_STRINGS and all(isinstance(s, str) and s for s in self.stop),
            "stop",
            f"at most {MAX_STOP_STRINGS} non-empty strings",
        )
        self._require(self.detokenize or not self.stop, "stop", "empty when detokenize is False")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._require(value is None or 0 <= value <= MAX_LOGPROBS, name, f"None or between 0 and {MAX_LOGPROBS}")
        if self.logit_bias is not None:
            self.logit_bias = {int(token): float(bias) for token, bias in self.logit_bias.items()}
            self._require(
                len(self.logit_bias) <= MAX_TOKEN_LIST
                and all(math.isfinite(b) and -100 <= b <= 100 for b in self.logit_bias.values()),
                "logit_bias",
                f"at most {MAX_TOKEN_LIST} values within [-100, 100]",
            )
        if self.allowed_token_ids is not None:
            self._require(len(self.allowed_token_ids) > 0, "allowed_token_ids", "None or a non-empty list")
        self._require(
            len(self.bad_words) <= MAX_TOKEN_LIST and all(isinstance(w, str) and w for w in self.bad_words),
            "bad_words",
            f"at most {MAX_TOKEN_LIST} non-empty strings",
        )
        self._require(
            self.truncate_prompt_tokens is None or self.truncate_prompt_tokens >= 1,
            "truncate_prompt_tokens",
            "None or at least 1",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def _finite(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and math.isfinite(value)
        self._require(is_number and low <= value <= high, name, f"a number between {low:g} and {high:g}")

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise RequestError(f"{name} is {getattr(self, name)!r}; it must be {expected}.", param=name)


class PoolingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to turn hidden states into an embedding.

    Attributes:
        dimensions: cut the vector to this length before normalising (Matryoshka models only).
        normalize: L2-normalise the result.
    """

    task: Literal["embed", "classify", "score"] = "embed"
    dimensions: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.dimensions is not None and self.dimensions < 1:
            raise RequestError(f"dimensions is {self.dimensions}; it must be at least 1.", param="dimensions")


class BeamSearchParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Beam search over ``beam_width`` hypotheses; scores are divided by length ** ``length_penalty``."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_N:
            raise RequestError(
                f"beam_width is {self.beam_width}; it must be between 1 and {MAX_N}.", param="beam_width"
            )
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; it must be at least 1.", param="max_tokens")
