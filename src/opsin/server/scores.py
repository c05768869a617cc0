"""``POST /score`` and ``POST /rerank``: how alike inputs are, by the cosine of their vectors. The shapes are vLLM's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.errors import RequestError
from opsin.outputs import EmbeddingRequestOutput, PoolingRequestOutput, ScoringRequestOutput
from opsin.params import PoolingParams
from opsin.processing.processor import ProcessedRequest
from opsin.processing.scoring import pairs
from opsin.server.pooling import pool, refuse_truncation, usage_of
from opsin.server.requests import Request, RerankRequest, ScoreInput, ScoreInputs, ScoreRequest
from opsin.server.state import ServerState, renamed
from opsin.server.transport import GoneResponse, json_response
from opsin.server.vector_answers import RerankDocument, Reranking, RerankResult, ScoreItem, Scores

_MAX_INPUTS = 2048
_SPELLINGS = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))


async def create_score(http: HTTPRequest, server: ServerState) -> Response:
    """Compare one input with each of several, or two lists one by one."""
    request = await server.read(http, ScoreRequest)
    refuse_truncation(request)
    names = next((pair for pair in _SPELLINGS if all(getattr(request, name) is not None for name in pair)), None)
    if names is None:
        spelt = " or ".join(" and ".join(pair) for pair in _SPELLINGS)
        raise RequestError(f"Give two inputs or lists of inputs: {spelt}.", param="text_1")
    first, second = (_listed(getattr(request, name), name) for name in names)
    compared = pairs(len(first), len(second))
    name = server.name_of(http, request, "score")
    outputs = await _vectors(
        http,
        server,
        name,
        request,
        _named(names[0], getattr(request, names[0]), first),
        _named(names[1], getattr(request, names[1]), second),
    )
    if outputs is None:
        return GoneResponse()
    scores = _scores(outputs, len(first), compared)
    items = [ScoreItem(i, score) for i, score in enumerate(scores)]
    return json_response(Scores(name, int(time.time()), server.names[0], items, usage_of(outputs)))


async def rerank(http: HTTPRequest, server: ServerState) -> Response:
    """Order documents by how alike they are to a query, the most alike first."""
    request = await server.read(http, RerankRequest)
    refuse_truncation(request)
    documents = _listed(request.documents, "documents")
    top_n = request.top_n or len(documents)
    if top_n < 0:
        raise RequestError(f"top_n is {top_n}; it must be at least 0, which is all of them.", param="top_n")
    name = server.name_of(http, request, "rerank")
    outputs = await _vectors(
        http, server, name, request, [("query", request.query)], _named("documents", request.documents, documents)
    )
    if outputs is None:
        return GoneResponse()
    scores = _scores(outputs, 1, pairs(1, len(documents)))
    ranked = sorted(range(len(documents)), key=lambda i: -scores[i])[:top_n]
    results = [RerankResult(i, _document(documents[i]), scores[i]) for i in ranked]
    return json_response(Reranking(name, server.names[0], usage_of(outputs), results))


async def _vectors(
    http: HTTPRequest,
    server: ServerState,
    name: str,
    request: Request,
    first: Sequence[tuple[str, ScoreInput]],
    second: Sequence[tuple[str, ScoreInput]],
) -> list[PoolingRequestOutput] | None:
    """The vectors of all inputs, each with the name of its field; texts as they are, messages through the template."""
    params = PoolingParams()

    async def prepare_one(field: str, item: ScoreInput) -> ProcessedRequest:
        with renamed(f"{field}.content"):
            return await read(field, item)

    async def read(field: str, item: ScoreInput) -> ProcessedRequest:
        if isinstance(item, str):
            return await server.prepare(name, request, item, params, field)
        messages = [{"role": "user", "content": item.get("content")}]
        return await server.prepare_chat(name, request, messages, params, add_generation_prompt=False)

    async def prepare() -> list[ProcessedRequest]:
        return [await prepare_one(*each) for each in (*first, *second)]

    return await pool(http, server, prepare, len(first) + len(second))


def _named(field: str, given: ScoreInputs, items: Sequence[ScoreInput]) -> list[tuple[str, ScoreInput]]:
    """Each input with where it stands in the body."""
    return [(f"{field}.{i}" if isinstance(given, list) else field, item) for i, item in enumerate(items)]


def _scores(
    outputs: Sequence[PoolingRequestOutput], num_first: int, compared: Sequence[tuple[int, int]]
) -> list[float]:
    vectors = [output for output in outputs if isinstance(output, EmbeddingRequestOutput)]
    return [ScoringRequestOutput.of(vectors[i], vectors[num_first + j]).outputs.score for i, j in compared]


def _listed(given: ScoreInputs, field: str) -> list[ScoreInput]:
    items: list[ScoreInput] = list(given) if isinstance(given, list) else [given]
    if not 1 <= len(items) <= _MAX_INPUTS:
        raise RequestError(f"{field} has {len(items)} entries; give between 1 and {_MAX_INPUTS}.", param=field)
    return items


def _document(item: ScoreInput) -> RerankDocument:
    if isinstance(item, str):
        return RerankDocument(item)
    content: Any = item.get("content")
    return RerankDocument(content) if isinstance(content, str) else RerankDocument(multi_modal=content)
