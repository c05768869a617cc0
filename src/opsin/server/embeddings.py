"""``POST /v1/embeddings``: vectors of texts, or of one conversation with pictures."""

from __future__ import annotations

import array
import asyncio
import base64
import contextlib
import sys
import time

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.errors import EngineDeadError, RequestError
from opsin.outputs import PoolingRequestOutput
from opsin.params import PoolingParams
from opsin.processing.processor import ProcessedRequest
from opsin.server.answers import EmbeddingItem, Embeddings, EmbeddingUsage
from opsin.server.requests import EmbeddingRequest
from opsin.server.state import ServerState, blame, prompts_of
from opsin.server.transport import ClientGone, GoneResponse, json_response, until_gone

_MAX_INPUTS = 2048  # OpenAI's


async def create_embeddings(http: HTTPRequest, server: ServerState) -> Response:
    """Turn inputs into vectors: the last token's final hidden state, normalised."""
    request = await server.read(http, EmbeddingRequest)
    if (request.input is None) == (request.messages is None):
        raise RequestError("Give either input or messages.", param="input")
    params = PoolingParams(dimensions=request.dimensions)
    inputs = [] if request.messages is not None else prompts_of(request.input, "input")
    if len(inputs) > _MAX_INPUTS:
        raise RequestError(f"input has {len(inputs)} entries; at most {_MAX_INPUTS} are taken.", param="input")
    name = server.name_of(http, request, "embd")

    async def prepare() -> list[ProcessedRequest]:
        if request.messages is not None:
            return [await server.prepare_chat(name, request, request.messages, params, add_generation_prompt=False)]
        return [await server.prepare(name, request, text, params, "input") for text in inputs]

    async def work() -> Embeddings:
        with server.admission.enter(max(1, len(inputs))):
            prepared = await prepare()
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(_embed(server, processed)) for processed in prepared]
            except ExceptionGroup as failures:  # one cause is enough, and its class decides the status
                raise failures.exceptions[0] from None
        items = [
            EmbeddingItem(i, _written(task.result(), request.encoding_format == "base64"))
            for i, task in enumerate(tasks)
        ]
        total = sum(len(processed.request.prompt_token_ids) for processed in prepared)
        return Embeddings(name, int(time.time()), server.names[0], items, EmbeddingUsage(total, total))

    try:
        with blame("input" if request.messages is None else "messages"):
            return json_response(await until_gone(http.receive, work()))
    except ClientGone:
        return GoneResponse()


async def _embed(server: ServerState, processed: ProcessedRequest) -> list[float]:
    metrics = server.metrics
    metrics.admitted(len(processed.request.prompt_token_ids), len(processed.sources))
    async with contextlib.aclosing(server.engine.stream(processed, "final")) as outputs:
        async for output in outputs:
            assert isinstance(output, PoolingRequestOutput)
            metrics.finished("stop", None, 0.0)
            return output.outputs.embedding
    raise EngineDeadError("The engine stopped before the request was answered.")


def _written(vector: list[float], as_base64: bool) -> list[float] | str:
    if not as_base64:
        return vector
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")
