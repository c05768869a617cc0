"""``POST /v1/embeddings``: vectors of texts, or of one conversation with pictures."""

from __future__ import annotations

import time

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.outputs import EmbeddingOutput
from opsin.params import PoolingParams
from opsin.server.answers import EmbeddingItem, Embeddings
from opsin.server.pooling import as_base64, pool_inputs, usage_of
from opsin.server.requests import EmbeddingRequest
from opsin.server.state import ServerState
from opsin.server.transport import GoneResponse, json_response


async def create_embeddings(http: HTTPRequest, server: ServerState) -> Response:
    """Turn inputs into vectors: the last token's final hidden state, normalised."""
    request = await server.read(http, EmbeddingRequest)
    outputs = await pool_inputs(http, server, request, PoolingParams(dimensions=request.dimensions), "embd")
    if outputs is None:
        return GoneResponse()
    name, finished = outputs
    items: list[EmbeddingItem] = []
    for i, output in enumerate(finished):
        assert isinstance(output.outputs, EmbeddingOutput)
        vector = output.outputs
        items.append(
            EmbeddingItem(i, as_base64(vector.data) if request.encoding_format == "base64" else vector.embedding)
        )
    return json_response(Embeddings(name, int(time.time()), server.names[0], items, usage_of(finished)))
