"""``POST /v1/embeddings``: vectors of texts, or of one conversation with pictures."""

from __future__ import annotations

import time

import numpy as np
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.outputs import EmbeddingOutput
from opsin.params import PoolingParams
from opsin.server.pooling import pool_inputs, usage_of
from opsin.server.requests import EmbeddingRequest
from opsin.server.state import ServerState
from opsin.server.transport import GoneResponse
from opsin.server.vector_answers import Embeddings
from opsin.server.vectors import vectors_response


async def create_embeddings(http: HTTPRequest, server: ServerState) -> Response:
    """Turn inputs into vectors: the last token's final hidden state, normalised."""
    request = await server.read(http, EmbeddingRequest)
    outputs = await pool_inputs(http, server, request, PoolingParams(dimensions=request.dimensions), "embd")
    if outputs is None:
        return GoneResponse()
    name, finished = outputs
    vectors: list[np.ndarray] = []
    for output in finished:
        assert isinstance(output.outputs, EmbeddingOutput)
        vectors.append(output.outputs.data)
    body = Embeddings(name, int(time.time()), server.names[0], [], usage_of(finished))
    return await vectors_response(request, vectors, body)
