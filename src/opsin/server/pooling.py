"""Requests that generate nothing: the road that all of them take, and ``POST /pooling`` and ``POST /classify``."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.errors import RequestError
from opsin.outputs import EmbeddingOutput, PoolingRequestOutput, TokenEmbeddingOutput
from opsin.params import PoolingParams
from opsin.processing.pooling import missing_head
from opsin.processing.processor import ProcessedRequest
from opsin.server.requests import ClassifyRequest, EmbeddingRequest, PoolingRequest, VectorRequest
from opsin.server.runs import all_of, run_whole
from opsin.server.state import ServerState, blame, prompts_of
from opsin.server.transport import ClientGone, GoneResponse, until_gone
from opsin.server.vector_answers import EmbeddingUsage, Poolings
from opsin.server.vectors import check_told, vectors_response

_MAX_INPUTS = 2048  # OpenAI's


async def create_pooling(http: HTTPRequest, server: ServerState) -> Response:
    """Read numbers off inputs: every token's vector, or ("task": "embed") the last one's."""
    request = await server.read(http, PoolingRequest)
    params = PoolingParams(task=request.task or "token_embed", dimensions=request.dimensions)
    outputs = await pool_inputs(http, server, request, params, "pool")
    if outputs is None:
        return GoneResponse()
    name, finished = outputs
    vectors: list[np.ndarray] = []
    for output in finished:
        assert isinstance(output.outputs, EmbeddingOutput | TokenEmbeddingOutput)
        vectors.append(output.outputs.data)
    body = Poolings(name, int(time.time()), server.names[0], [], usage_of(finished))
    return await vectors_response(request, vectors, body)


async def classify(http: HTTPRequest, server: ServerState) -> Response:
    """vLLM's route for models with a classification head, which no served architecture has."""
    await server.read(http, ClassifyRequest)
    raise missing_head("classify")


async def pool_inputs(
    http: HTTPRequest, server: ServerState, request: EmbeddingRequest, params: PoolingParams, prefix: str
) -> tuple[str, list[PoolingRequestOutput]] | None:
    """Run a body's ``input`` or ``messages``; None when the client has gone.

    Returns:
        The answer's id, and one output per input.

    Raises:
        OpsinError: what is wrong.
    """
    refuse_truncation(request)
    messages = request.messages
    if (request.input is None) == (messages is None):
        raise RequestError("Give either input or messages.", param="input")
    inputs = [] if messages is not None else prompts_of(request.input, "input")
    if len(inputs) > _MAX_INPUTS:
        raise RequestError(f"input has {len(inputs)} entries; at most {_MAX_INPUTS} are taken.", param="input")
    check_told(request, len(inputs))
    name = server.name_of(http, request, prefix)

    async def prepare() -> list[ProcessedRequest]:
        if messages is not None:
            return [await server.prepare_chat(name, request, messages, params, add_generation_prompt=False)]
        return [await server.prepare(name, request, text, params, "input") for text in inputs]

    with blame("input" if messages is None else "messages"):
        outputs = await pool(http, server, prepare, max(1, len(inputs)))
    return None if outputs is None else (name, outputs)


async def pool(
    http: HTTPRequest, server: ServerState, prepare: Callable[[], Awaitable[list[ProcessedRequest]]], num_places: int
) -> list[PoolingRequestOutput] | None:
    """Admit, prepare and run requests, and wait for all of them; None when the client has gone.

    Args:
        num_places: places to take in the queue.

    Raises:
        OpsinError: the first failure among them.
    """

    async def work() -> list[PoolingRequestOutput]:
        with server.admission.enter(num_places):
            return await all_of(_run(server, processed) for processed in await prepare())

    try:
        return await until_gone(http.receive, work())
    except ClientGone:
        return None


async def _run(server: ServerState, processed: ProcessedRequest) -> PoolingRequestOutput:
    metrics = server.metrics
    metrics.admitted(len(processed.request.prompt_token_ids), len(processed.sources))
    reason = "abort"  # the client has left, or another input has failed
    try:
        output = await run_whole(server.engine, processed)
        assert isinstance(output, PoolingRequestOutput)
        reason = "stop"
        return output
    except Exception:
        reason = "error"
        raise
    finally:
        metrics.finished(reason, None, 0.0)


def refuse_truncation(request: VectorRequest) -> None:
    """Refuse what would give the vector of another text.

    Raises:
        RequestError: ``param`` is the field.
    """
    if request.truncate_prompt_tokens not in (None, -1):
        raise RequestError(
            "truncate_prompt_tokens is not supported for vectors yet; leave it out.", param="truncate_prompt_tokens"
        )


def usage_of(outputs: Sequence[PoolingRequestOutput]) -> EmbeddingUsage:
    """The tokens of all prompts."""
    total = sum(len(output.prompt_token_ids) for output in outputs)
    return EmbeddingUsage(total, total)
