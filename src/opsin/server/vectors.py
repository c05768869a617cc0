"""How vectors are sent: as numbers, as base64, or as the bytes themselves, which are told of in a header."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from starlette.responses import Response

from opsin.errors import RequestError
from opsin.server.requests import EmbeddingRequest
from opsin.server.transport import json_response
from opsin.server.vector_answers import EmbeddingItem, Embeddings, EmbeddingUsage, PoolingItem, Poolings

_MAX_TOLD = 512  # vectors; a header that tells of more is longer than clients take


class PackedVector(msgspec.Struct):
    """Where in the bytes a vector is, or several in rows, and how its numbers are written."""

    index: int
    embed_dtype: str
    endianness: Literal["little", "big"]
    start: int
    end: int
    shape: tuple[int, ...]


class PackedVectors(msgspec.Struct):
    """The ``metadata`` header of vectors that are sent as bytes."""

    id: str
    created: int
    model: str
    data: list[PackedVector]
    usage: EmbeddingUsage


def check_told(request: EmbeddingRequest, num_vectors: int) -> None:
    """See that the header can tell of so many vectors, where it is to.

    Raises:
        RequestError: it cannot.
    """
    if request.encoding_format == "bytes" and num_vectors > _MAX_TOLD:
        raise RequestError(
            f"{num_vectors} vectors are too many for one header; send at most {_MAX_TOLD}, or ask for 'bytes_only'.",
            param="encoding_format",
        )


async def vectors_response(
    request: EmbeddingRequest, vectors: Sequence[np.ndarray], body: Embeddings | Poolings
) -> Response:
    """Send vectors as a request asks. They are written beside the event loop: there may be a hundred million numbers.

    Args:
        vectors: float32, per input; of one dimension, or of two where there are several.
        body: the answer without them; it is filled where it is JSON.
    """
    return await asyncio.to_thread(_response, request, vectors, body)


def _response(request: EmbeddingRequest, vectors: Sequence[np.ndarray], body: Embeddings | Poolings) -> Response:
    dtype, order = request.embed_dtype or "float32", _byte_order(request)
    form = request.encoding_format or "float"
    if form in ("float", "base64"):
        item: Any = EmbeddingItem if isinstance(body, Embeddings) else PoolingItem
        for i, vector in enumerate(vectors):
            told = _numbers(vector) if form == "float" else base64.b64encode(_packed(vector, dtype, order)).decode()
            body.data.append(item(i, told))
        return json_response(body)
    packed = [_packed(vector, dtype, order) for vector in vectors]
    places, end = list[PackedVector](), 0
    for i, (vector, data) in enumerate(zip(vectors, packed, strict=True)):
        begin, end = end, end + len(data)
        places.append(PackedVector(i, dtype, order, begin, end, vector.shape))
    about = PackedVectors(body.id, body.created, body.model, places, body.usage)
    headers = {"metadata": json.dumps(msgspec.to_builtins(about))} if form == "bytes" else None  # in ASCII
    return Response(b"".join(packed), media_type="application/octet-stream", headers=headers)


def _numbers(vector: np.ndarray) -> msgspec.Raw:
    """A vector, or rows of them, in JSON: written row by row, between which others get the interpreter."""
    if vector.ndim > 1:
        return msgspec.Raw(b"[" + b",".join(map(_numbers, vector)) + b"]")
    return msgspec.Raw(msgspec.json.encode(vector.tolist()))


def _byte_order(request: EmbeddingRequest) -> Literal["little", "big"]:
    return sys.byteorder if request.endianness in (None, "native") else request.endianness


def _packed(numbers: np.ndarray, dtype: str, order: Literal["little", "big"]) -> bytes:
    """The numbers, one row after the other."""
    if dtype == "bfloat16":  # of which numpy knows nothing: the upper half of a float32, rounded to even
        bits = numbers.astype(np.float32).view(np.uint32)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        values = numbers.astype(dtype)
    return values.astype(values.dtype.newbyteorder("<" if order == "little" else ">")).tobytes()
