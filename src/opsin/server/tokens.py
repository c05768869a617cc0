"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.errors import RequestError
from opsin.params import PoolingParams
from opsin.server.answers import Text, Tokens
from opsin.server.requests import DetokenizeRequest, TokenizeRequest
from opsin.server.state import ServerState
from opsin.server.transport import ClientGone, GoneResponse, json_response, until_gone


async def tokenize(http: HTTPRequest, server: ServerState) -> Response:
    """The tokens that a prompt or a conversation costs; pictures are expanded."""
    request = await server.read(http, TokenizeRequest)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("Give either prompt or messages.", param="prompt")

    async def work() -> list[int]:
        if request.messages is not None:
            name = server.name_of(http, request, "tokens")
            params = PoolingParams()  # nothing need be left for an answer
            prepared = await server.prepare_chat(
                name, request, request.messages, params, add_generation_prompt=True, tools=request.tools
            )
            return prepared.request.prompt_token_ids
        special = request.add_special_tokens is not False
        return await server.engine.tokenize(request.prompt or "", add_special_tokens=special)

    try:
        with server.admission.enter(1):
            ids = await until_gone(http.receive, work())
    except ClientGone:
        return GoneResponse()
    return json_response(Tokens(len(ids), server.engine.max_model_len, ids))


async def detokenize(http: HTTPRequest, server: ServerState) -> Response:
    """The text of token ids, special tokens included."""
    request = await server.read(http, DetokenizeRequest)
    wrong = next((i for i in request.tokens if not 0 <= i < 2**31), None)
    if wrong is not None:
        raise RequestError(f"tokens holds {wrong}, which is no token id.", param="tokens")
    with server.admission.enter(1):
        return json_response(Text(await server.engine.detokenize(request.tokens)))
