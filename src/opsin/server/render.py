"""``POST /v1/chat/completions/render`` and its like for completions: what a body becomes before it is answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.errors import RequestError
from opsin.params import SamplingParams
from opsin.processing.processor import ProcessedRequest
from opsin.server.chat import plan_chat, reasoning_of
from opsin.server.completions import plan_completion
from opsin.server.constraints import blame_form, field_of
from opsin.server.requests import ChatCompletionRequest, CompletionRequest, SamplingRequest
from opsin.server.state import ServerState
from opsin.server.transport import ClientGone, GoneResponse, until_gone


class PlaceholderRange(msgspec.Struct):
    """Where in the prompt an item stands: from its first feature to its last, with the text between."""

    offset: int
    length: int


class RenderedMedia(msgspec.Struct):
    """The pictures and videos of a prompt, in its order, by modality.

    Attributes:
        mm_hashes: what names their features in the cache.
    """

    mm_hashes: dict[str, list[str]]
    mm_placeholders: dict[str, list[PlaceholderRange]]
    kwargs_data: None = None


class RenderedRequest(msgspec.Struct):
    """A prompt as the engine would take it, with pictures expanded, and the parameters it would be answered with.

    Attributes:
        features: None where the prompt is text alone.
    """

    request_id: str
    token_ids: list[int]
    features: RenderedMedia | None
    sampling_params: dict[str, Any]
    model: str
    stream: bool
    stream_options: dict[str, Any] | None
    cache_salt: str | None
    priority: int
    kv_transfer_params: None = None


async def render_chat(http: HTTPRequest, server: ServerState) -> Response:
    """What a conversation becomes: its tokens, where its pictures stand, and the parameters. Nothing is generated."""
    request = await server.read(http, ChatCompletionRequest)
    _refuse_search(request)
    name = server.name_of(http, request, "chatcmpl")
    plan = plan_chat(server, request, name, reasoning_of(server, request))

    def write(prepared: list[ProcessedRequest]) -> RenderedRequest:
        return _rendered(server, request, name, prepared[0])

    with blame_form(plan.form_field):
        return await _answer(http, server, plan.prepare, write)


async def render_completion(http: HTTPRequest, server: ServerState) -> Response:
    """What prompts become: a list with an entry for each of them, as for conversations."""
    request = await server.read(http, CompletionRequest)
    _refuse_search(request)
    name = server.name_of(http, request, "cmpl")
    plan = plan_completion(server, request, name)

    def write(prepared: list[ProcessedRequest]) -> list[RenderedRequest]:
        return [_rendered(server, request, name, processed) for processed in prepared]

    with blame_form(field_of(request)):
        return await _answer(http, server, plan.prepare, write)


def _refuse_search(request: SamplingRequest) -> None:
    if request.use_beam_search:
        raise RequestError("A search is many requests, and cannot be rendered as one.", param="use_beam_search")


async def _answer(
    http: HTTPRequest,
    server: ServerState,
    prepare: Callable[[], Awaitable[list[ProcessedRequest]]],
    write: Callable[[list[ProcessedRequest]], RenderedRequest | list[RenderedRequest]],
) -> Response:
    try:
        with server.admission.enter(1):
            prepared = await until_gone(http.receive, prepare())
    except ClientGone:
        return GoneResponse()
    return Response(msgspec.json.encode(write(prepared)), media_type="application/json")


def _rendered(server: ServerState, request: SamplingRequest, name: str, processed: ProcessedRequest) -> RenderedRequest:
    params = processed.request.params
    assert isinstance(params, SamplingParams)
    options = request.stream_options
    return RenderedRequest(
        name,
        processed.request.prompt_token_ids,
        _media(processed) if processed.request.media else None,
        msgspec.structs.asdict(params),
        request.model or server.names[0],
        bool(request.stream),
        None if options is None else msgspec.structs.asdict(options),
        request.cache_salt,
        request.priority or 0,
    )


def _media(processed: ProcessedRequest) -> RenderedMedia:
    told = RenderedMedia({}, {})
    for i, item in enumerate(processed.request.media):
        spans = [span for span in processed.request.spans if span.item == i]
        begin, end = min(span.start for span in spans), max(span.start + span.length for span in spans)
        told.mm_hashes.setdefault(item.modality, []).append(item.key.hex())
        told.mm_placeholders.setdefault(item.modality, []).append(PlaceholderRange(begin, end - begin))
    return told
