"""What callers get back. Field names and shapes are vLLM's. No torch here."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

from opsin.types import FinishReason

_THUMBNAIL_EDGE = 160


@dataclass(slots=True)
class Logprob:
    """Log-probability and 1-based rank of one token at one position, and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


SampleLogprobs = list[dict[int, Logprob]]
"""Per generated token: the chosen one and the likeliest ones, by token id."""

PromptLogprobs = list[dict[int, Logprob] | None]
"""Per prompt token; None for the first, which nothing predicts."""


@dataclass(slots=True)
class CompletionOutput:
    """One answer.

    Attributes:
        text: all of it so far, or what is new in a stream of deltas; likewise ``token_ids`` and ``logprobs``.
        finish_reason: "stop" (an end token or a stop string), "length", "abort"; None while it runs.
        stop_reason: the stop string or stop token id that ended it; None where the model's own end token did.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of the monotonic clock; None while they have not."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens, all answers together, over the time from arrival to the last one."""
        if self.last_token_time is None or self.last_token_time <= self.arrival_time:
            return None
        return self.num_generation_tokens / (self.last_token_time - self.arrival_time)


class _Picture(Protocol):
    def decode(self) -> Any:
        """A PIL image."""
        ...


class Thumbnails:
    """Small versions of a request's pictures, made when they are first shown; the pictures are let go of then.

    Args:
        pictures: anything with ``decode() -> PIL.Image``; what cannot be decoded is left out.
    """

    def __init__(self, pictures: Sequence[_Picture]) -> None:
        self._pictures: list[_Picture] = list(pictures)
        self._uris: list[str] = []

    def data_uris(self) -> list[str]:
        """JPEG data URIs."""
        for picture in self._pictures:
            try:
                image = picture.decode()
            except (OSError, ValueError):  # a MediaError is a ValueError: there is nothing to show
                continue
            image.thumbnail((_THUMBNAIL_EDGE, _THUMBNAIL_EDGE))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
            self._uris.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
        self._pictures = []
        return list(self._uris)


@dataclass(slots=True)
class RequestOutput:
    """The answer or answers to one prompt.

    Attributes:
        prompt_token_ids: expanded, so its length is what the prompt cost.
        num_cached_tokens: prompt tokens found in the prefix cache.
        num_media_tokens: prompt positions that hold features of pictures or videos.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    num_media_tokens: int = 0
    thumbnails: Thumbnails | None = field(default=None, repr=False, compare=False)

    def _repr_html_(self) -> str:
        """The pictures, the prompt's text and the answers, for notebooks."""
        pictures = "".join(
            f'<img src="{uri}" style="margin:0 8px 8px 0;border-radius:4px">'
            for uri in (self.thumbnails.data_uris() if self.thumbnails else ())
        )
        prompt = f'<div style="color:#777;white-space:pre-wrap">{html.escape(self.prompt)}</div>' if self.prompt else ""
        answers = "".join(
            f'<div style="white-space:pre-wrap;margin-top:4px">{html.escape(answer.text)}</div>'
            for answer in self.outputs
        )
        facts = [f"{len(self.prompt_token_ids)} prompt tokens"]
        facts.append(f"{sum(len(answer.token_ids) for answer in self.outputs)} generated")
        if self.metrics is not None and self.metrics.tokens_per_second is not None:
            facts.append(f"{self.metrics.tokens_per_second:.1f} tokens/s")
        if not self.finished:
            facts.append("still running")
        line = f'<div style="color:#777;font-size:smaller;margin-top:4px">{", ".join(facts)}</div>'
        return f"<div>{pictures}{prompt}{answers}{line}</div>"


@dataclass(slots=True)
class EmbeddingOutput:
    """One vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)

    @property
    def data(self) -> np.ndarray:
        """The vector as a float32 array."""
        return np.array(self.embedding, dtype=np.float32)


@dataclass(slots=True)
class TokenEmbeddingOutput:
    """One vector per prompt token: float32 of shape (tokens, dimensions)."""

    data: np.ndarray


@dataclass(slots=True, frozen=True)
class Choice:
    """One of the answers that were weighed.

    Attributes:
        probability: calibrated by length; those of all choices add up to 1.
        raw_probability: not calibrated: long answers have less.
        logprob: the sum of its tokens' log-probabilities.
    """

    text: str
    probability: float
    raw_probability: float
    logprob: float
    num_tokens: int


@dataclass(slots=True, frozen=True, repr=False)
class PickOutput:
    """How probable each of the given answers is, if it is to be one of them.

    With log-probability l and n tokens per choice, and m the mean of n over the choices, ``raw_probability`` is the
    softmax of l and ``probability`` the softmax of m * l / n. So an answer does not lose by having more tokens, and
    answers of equally many tokens have the same probability either way.

    Attributes:
        choices: in the order in which they were given.
    """

    choices: tuple[Choice, ...]

    @classmethod
    def weigh(cls, texts: Sequence[str], logprobs: Sequence[float], num_tokens: Sequence[int]) -> Self:
        """From each choice's text, log-probability and number of tokens."""
        mean = sum(num_tokens) / len(num_tokens)
        fair = _softmax([mean * logprob / n for logprob, n in zip(logprobs, num_tokens, strict=True)])
        rows = zip(texts, fair, _softmax(logprobs), logprobs, num_tokens, strict=True)
        return cls(tuple(Choice(*row) for row in rows))

    @property
    def best(self) -> str:
        """The most probable choice; the first of equals."""
        return max(self.choices, key=lambda choice: choice.probability).text

    @property
    def probabilities(self) -> dict[str, float]:
        """By choice."""
        return {choice.text: choice.probability for choice in self.choices}

    @property
    def mean(self) -> float:
        """The expected number, for choices that are numbers: ratings, counts.

        Raises:
            ValueError: a choice is not a number.
        """
        return sum(float(choice.text) * choice.probability for choice in self.choices)

    def __getitem__(self, text: str) -> float:
        return self.probabilities[text]

    def __repr__(self) -> str:
        ranked = sorted(self.choices, key=lambda choice: -choice.probability)
        return f"PickOutput({', '.join(f'{choice.text!r} {choice.probability:.1%}' for choice in ranked)})"


@dataclass(slots=True)
class ScoringOutput:
    """How alike two inputs are: the cosine of their vectors."""

    score: float


@dataclass(slots=True)
class PoolingRequestOutput:
    """What was read off one prompt.

    Attributes:
        outputs: by task an ``EmbeddingOutput``, a ``TokenEmbeddingOutput`` or a ``PickOutput``.
    """

    request_id: str
    outputs: Any
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(slots=True)
class EmbeddingRequestOutput(PoolingRequestOutput):
    """The vector of one prompt."""

    outputs: EmbeddingOutput


@dataclass(slots=True)
class ScoringRequestOutput:
    """The score of one pair; ``prompt_token_ids`` are those of both, one after the other."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True

    @classmethod
    def of(cls, first: EmbeddingRequestOutput, second: EmbeddingRequestOutput) -> Self:
        """From both vectors."""
        score = ScoringOutput(cosine(first.outputs.embedding, second.outputs.embedding))
        return cls(second.request_id, score, [*first.prompt_token_ids, *second.prompt_token_ids])


@dataclass(slots=True)
class BeamSearchSequence:
    """One hypothesis: ``tokens`` holds the prompt's ids and the answer's, ``text`` the answer alone."""

    tokens: list[int]
    cum_logprob: float
    text: str | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The hypotheses of one prompt, best first."""

    sequences: list[BeamSearchSequence]


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """The cosine of the angle between two vectors; 0 where one of them has no direction."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 0.0


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    total = sum(weights)
    return [weight / total for weight in weights]
