"""The bodies of answers that are read off a model instead of written by it: vectors, scores, picks."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class EmbeddingItem(msgspec.Struct):
    """One vector, as numbers or as base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Token counts of inputs."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    """The answer to ``POST /v1/embeddings``."""

    id: str
    created: int
    model: str
    data: list[EmbeddingItem]
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class PoolingItem(msgspec.Struct):
    """What was read off one input, as numbers or as base64."""

    index: int
    data: list[float | list[float]] | str
    object: Literal["pooling"] = "pooling"


class Poolings(msgspec.Struct):
    """The answer to ``POST /pooling``."""

    id: str
    created: int
    model: str
    data: list[PoolingItem]
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class ScoreItem(msgspec.Struct):
    """How alike one pair is."""

    index: int
    score: float
    object: Literal["score"] = "score"


class Scores(msgspec.Struct):
    """The answer to ``POST /score``."""

    id: str
    created: int
    model: str
    data: list[ScoreItem]
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class RerankDocument(msgspec.Struct):
    """A document, as text or as the parts of a message."""

    text: str | None = None
    multi_modal: list[dict[str, Any]] | None = None


class RerankResult(msgspec.Struct):
    """A document's place in the ranking; ``index`` is the one that it had in the request."""

    index: int
    document: RerankDocument
    relevance_score: float


class Reranking(msgspec.Struct):
    """The answer to ``POST /rerank``."""

    id: str
    model: str
    usage: EmbeddingUsage
    results: list[RerankResult]


class PickChoice(msgspec.Struct):
    """One of the given answers; see ``opsin.outputs.PickOutput`` for what the numbers are."""

    index: int
    text: str
    probability: float
    raw_probability: float
    logprob: float
    num_tokens: int


class Pick(msgspec.Struct):
    """The answer to ``POST /v1/pick``."""

    id: str
    created: int
    model: str
    best: str
    choices: list[PickChoice]
    usage: EmbeddingUsage
    object: Literal["pick"] = "pick"
