"""OpenAPI's description of the server: FastAPI's own, with the bodies, answers and errors that it does not know of."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from opsin.server.answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Load,
    ModelCard,
    ModelList,
    Text,
    Tokens,
    Version,
)
from opsin.server.errors import ErrorBody
from opsin.server.gate import OPEN, PROBES
from opsin.server.render import RenderedRequest
from opsin.server.response_answers import ModelResponse, ResponseEvent
from opsin.server.seen import Seen
from opsin.server.vector_answers import Embeddings, Pick, Poolings, Reranking, Scores

_REFERENCE = "#/components/schemas/{name}"
_JSON, _STREAM, _TEXT, _BYTES = "application/json", "text/event-stream", "text/plain", "application/octet-stream"

_Answer = type[msgspec.Struct] | type[list[RenderedRequest]]

_ANSWERS: Mapping[str, Mapping[str, _Answer | None]] = {
    "/v1/chat/completions": {_JSON: ChatCompletion, _STREAM: ChatChunk},
    "/v1/responses": {_JSON: ModelResponse, _STREAM: ResponseEvent},
    "/v1/completions": {_JSON: Completion, _STREAM: Completion},
    "/v1/embeddings": {_JSON: Embeddings, _BYTES: None},
    "/page/seen": {_JSON: Seen},
    "/v1/pick": {_JSON: Pick},
    "/pooling": {_JSON: Poolings, _BYTES: None},
    "/score": {_JSON: Scores},
    "/v1/score": {_JSON: Scores},
    "/rerank": {_JSON: Reranking},
    "/v1/rerank": {_JSON: Reranking},
    "/v2/rerank": {_JSON: Reranking},
    "/v1/chat/completions/render": {_JSON: RenderedRequest},
    "/v1/completions/render": {_JSON: list[RenderedRequest]},
    "/tokenize": {_JSON: Tokens},
    "/detokenize": {_JSON: Text},
    "/v1/models": {_JSON: ModelList},
    "/v1/models/{name}": {_JSON: ModelCard},
    "/version": {_JSON: Version},
    "/load": {_JSON: Load},
    "/metrics": {_TEXT: None},
    **{path: {} for path in PROBES},
}
"""By path: what an answer is made of, per media type; of a stream, each event. Other paths answer with errors alone."""


def body_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """What a route tells FastAPI of its body."""
    return {"requestBody": {"content": {_JSON: {"schema": _schema(kind)}}, "required": True}}


def complete(
    document: dict[str, Any], bodies: Mapping[str, type[msgspec.Struct]], *, needs_key: bool
) -> dict[str, Any]:
    """Say what is sent and answered; the document itself is changed.

    Args:
        document: what FastAPI knows.
        bodies: by path.
        needs_key: clients must send one.
    """
    answers = [kind for kinds in _ANSWERS.values() for kind in kinds.values() if kind is not None]
    _, schemas = msgspec.json.schema_components([*bodies.values(), *answers, ErrorBody], ref_template=_REFERENCE)
    document["components"] = {"schemas": schemas}
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"] = _responses(path)
            if needs_key and path not in OPEN:
                operation["security"] = [{"key": []}]
    return document


def _responses(path: str) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    if path in _ANSWERS:
        content = {media: {"schema": _schema(kind)} for media, kind in _ANSWERS[path].items()}
        responses["200"] = {"description": "The answer.", **({"content": content} if content else {})}
    if path in PROBES:
        responses["503"] = {"description": "Not now.", "content": {_TEXT: {"schema": _schema(None)}}}
    else:
        responses["default"] = {"description": "An error.", "content": {_JSON: {"schema": _schema(ErrorBody)}}}
    return responses


def _schema(kind: _Answer | None) -> dict[str, Any]:
    if kind is None:
        return {"type": "string"}
    if items := typing.get_args(kind):
        return {"type": "array", "items": _schema(items[0])}
    return {"$ref": _REFERENCE.format(name=kind.__name__)}
