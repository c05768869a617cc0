"""``POST /v1/pick``: the probability of each given answer to a question about pictures. Nothing is generated."""

from __future__ import annotations

import time
from contextlib import nullcontext

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.errors import RequestError
from opsin.outputs import PickOutput
from opsin.params import PoolingParams
from opsin.processing.messages import question_about
from opsin.processing.processor import ProcessedRequest
from opsin.server.pooling import pool, usage_of
from opsin.server.requests import PickRequest
from opsin.server.state import ServerState, blame, renamed
from opsin.server.transport import GoneResponse, json_response
from opsin.server.vector_answers import Pick, PickChoice


async def create_pick(http: HTTPRequest, server: ServerState) -> Response:
    """Weigh given answers against one another."""
    request = await server.read(http, PickRequest)
    params = PoolingParams(task="pick", choices=request.choices)
    if (request.messages is None) == (request.question is None):
        raise RequestError("Give either messages, or question (and image).", param="question")
    if request.image is not None and request.images is not None:
        raise RequestError("image and images are two names of the same; give one.", param="images")
    messages, given = request.messages, request.images if request.image is None else request.image
    if messages is None:
        messages = question_about([given] if isinstance(given, str) else given or [], request.question)
    elif given is not None:
        raise RequestError("image goes with question; put pictures into the messages.", param="image")
    name = server.name_of(http, request, "pick")

    async def prepare() -> list[ProcessedRequest]:
        return [await server.prepare_chat(name, request, messages, params, add_generation_prompt=True)]

    shown = "image" if request.images is None else "images"
    with renamed(shown) if request.messages is None else nullcontext(), blame("messages"):
        outputs = await pool(http, server, prepare, len(request.choices))
    if outputs is None:
        return GoneResponse()
    picked = outputs[0].outputs
    assert isinstance(picked, PickOutput)
    choices = [
        PickChoice(i, c.text, c.probability, c.raw_probability, c.logprob, c.num_tokens)
        for i, c in enumerate(picked.choices)
    ]
    return json_response(Pick(name, int(time.time()), server.names[0], picked.best, choices, usage_of(outputs)))
