"""The application: routes, and what they share. READ THIS FIRST."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import cache

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import opsin
from opsin.server.admission import Admission
from opsin.server.answers import Load, ModelCard, ModelList, Version
from opsin.server.chat import create_chat_completion
from opsin.server.client import EngineClient
from opsin.server.completions import create_completion
from opsin.server.config import ServerConfig
from opsin.server.embeddings import create_embeddings
from opsin.server.errors import MethodNotAllowedError, RouteNotFoundError
from opsin.server.gate import PROBES, Gate, Keys
from opsin.server.metrics import Metrics
from opsin.server.openapi import body_of, complete
from opsin.server.page import FILES, page_file
from opsin.server.pick import create_pick
from opsin.server.pooling import classify, create_pooling
from opsin.server.quota import Quotas
from opsin.server.reasoning import model_reasoning
from opsin.server.reference import reference_page
from opsin.server.render import render_chat, render_completion
from opsin.server.requests import (
    ChatCompletionRequest,
    ClassifyRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    PickRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
)
from opsin.server.response_input import ResponsesRequest
from opsin.server.responses import create_response, find_response
from opsin.server.scores import create_score, rerank
from opsin.server.seen import SeenRequest, see_picture
from opsin.server.state import ServerState
from opsin.server.tokens import detokenize, tokenize
from opsin.server.tools import tool_parser_name
from opsin.server.transport import json_response

Handler = Callable[[HTTPRequest, ServerState], Awaitable[Response]]

_POSTS: Sequence[tuple[str, Handler, type[msgspec.Struct]]] = (
    ("/v1/chat/completions", create_chat_completion, ChatCompletionRequest),
    ("/v1/responses", create_response, ResponsesRequest),
    ("/v1/completions", create_completion, CompletionRequest),
    ("/v1/embeddings", create_embeddings, EmbeddingRequest),
    ("/page/seen", see_picture, SeenRequest),
    ("/v1/pick", create_pick, PickRequest),
    ("/pooling", create_pooling, PoolingRequest),
    ("/score", create_score, ScoreRequest),
    ("/v1/score", create_score, ScoreRequest),
    ("/rerank", rerank, RerankRequest),
    ("/v1/rerank", rerank, RerankRequest),
    ("/v2/rerank", rerank, RerankRequest),
    ("/classify", classify, ClassifyRequest),
    ("/v1/chat/completions/render", render_chat, ChatCompletionRequest),
    ("/v1/completions/render", render_completion, CompletionRequest),
    ("/tokenize", tokenize, TokenizeRequest),
    ("/detokenize", detokenize, DetokenizeRequest),
)


def create_app(engine: EngineClient, config: ServerConfig, *, model: str) -> FastAPI:
    """The server of one engine. ``app.state.server`` is its ``ServerState``.

    Args:
        model: what the engine calls its model; clients may too, unless ``served_model_name`` is set.
    """
    server = ServerState(
        engine=engine,
        config=config,
        admission=Admission(engine.max_num_seqs + config.max_queue),
        metrics=Metrics((config.served_model_name or (model,))[0]),
        names=config.served_model_name or (model,),
        root=model,
        tool_parser=tool_parser_name(config, engine.get_chat_template(tools=True)),
        reasoning=model_reasoning(config, engine),
    )
    about = (opsin.__doc__ or "").partition("\n")[0]
    app = FastAPI(
        title="opsin",
        version=opsin.__version__,
        description=about,
        docs_url=None,
        redoc_url=None,
        openapi_url=None if config.disable_fastapi_docs else "/openapi.json",
        servers=[{"url": config.root_path}] if config.root_path else None,
        redirect_slashes=False,  # to a URL made of the Host header, which knows neither a proxy's path nor its TLS
    )
    app.state.server = server
    quotas = Quotas(config.max_requests_per_minute, config.max_requests_per_key)
    app.add_middleware(Posts, server=server)
    unlogged = None if config.disable_uvicorn_access_log else PROBES | config.unlogged_paths
    app.add_middleware(Gate, keys=Keys(config.api_key), quotas=quotas, metrics=server.metrics, unlogged=unlogged)
    if config.allowed_origins:  # outside: browsers ask without a key, and are to read refusals as well
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_exception_handler(HTTPException, _raise_in_form)
    for path, handler, body in _POSTS:
        _add_post(app, server, path, handler, body)
    _add_gets(app, server)
    for path, method in (("", "GET"), ("", "DELETE"), ("/input_items", "GET"), ("/cancel", "POST")):
        app.add_api_route("/v1/responses/{name}" + path, find_response, methods=[method])
    for path in FILES:
        _add_file(app, path)
    if config.disable_fastapi_docs:
        return app
    routes, bodies = app.openapi, {path: body for path, _, body in _POSTS}
    # Made once: either takes tens of milliseconds of the event loop, and nobody is held to a quota for asking.
    app.openapi = cache(lambda: complete(routes(), bodies, needs_key=bool(config.api_key)))
    reference = cache(lambda: reference_page(app.openapi()))

    async def docs() -> Response:  # FastAPI's own page loads its scripts from elsewhere
        page, headers = reference()
        return Response(page, media_type="text/html; charset=utf-8", headers=dict(headers))

    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    return app


class Posts:
    """ASGI middleware that takes POSTs to their handlers, past the router and what it wraps around each event sent, and
    has HEAD answered as GET is. Of a POST's path, a slash at the end makes no difference.

    Args:
        app: answers everything else.
    """

    def __init__(self, app: ASGIApp, server: ServerState) -> None:
        self._app = app
        self._server = server
        self._handlers = {path: handler for path, handler, _ in _POSTS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        handler = self._handlers.get(scope["path"].rstrip("/")) if is_post else None
        if handler is None:
            if scope["type"] == "http" and scope["method"] == "HEAD":  # its sender leaves the body out
                scope = {**scope, "method": "GET"}
            await self._app(scope, receive, send)
            return
        response = await handler(HTTPRequest(scope, receive), self._server)
        await response(scope, receive, send)


def _add_post(app: FastAPI, server: ServerState, path: str, handler: Handler, body: type[msgspec.Struct]) -> None:
    async def endpoint(http: HTTPRequest) -> Response:
        return await handler(http, server)

    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        name=handler.__name__,
        description=handler.__doc__,
        openapi_extra=body_of(body),
    )


def _add_file(app: FastAPI, path: str) -> None:
    async def file() -> Response:
        return page_file(path)

    app.add_api_route(path, file, methods=["GET"], include_in_schema=False)


def _add_gets(app: FastAPI, server: ServerState) -> None:
    def get(path: str) -> Callable[[Callable[..., Awaitable[Response]]], object]:
        return app.get(path, response_class=Response)

    @get("/v1/models")
    async def list_models() -> Response:
        """The names that the model goes by."""
        length = server.engine.max_model_len
        return json_response(ModelList([ModelCard(name, server.created, server.root, length) for name in server.names]))

    @get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        """One of these names."""
        server.require_model(name)
        return json_response(ModelCard(name, server.created, server.root, server.engine.max_model_len))

    @get("/version")
    async def version() -> Response:
        """opsin's version."""
        return json_response(Version(opsin.__version__))

    @get("/live")
    async def live() -> Response:
        """200: the process answers."""
        return Response()

    @get("/ready")
    async def ready() -> Response:
        """200: requests are taken; 503 while the engine is started (again), and once the server drains."""
        return _probe("The server is shutting down." if server.admission.is_draining else _engine_trouble(server))

    @get("/health")
    async def health() -> Response:
        """200: the engine runs; 503 otherwise."""
        return _probe(_engine_trouble(server))

    @get("/ping")
    async def ping() -> Response:
        """As /health, for hosts that ask here."""
        return _probe(_engine_trouble(server))

    @app.post("/ping", include_in_schema=False)
    async def ping_by_post() -> Response:
        return _probe(_engine_trouble(server))

    @get("/load")
    async def load() -> Response:
        """How many answers run or wait."""
        return json_response(Load(server.admission.num_admitted))

    @get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        engine = server.engine
        text = server.metrics.text(engine.stats(), engine.histograms(), engine.is_ready)
        return Response(text, media_type="text/plain; version=0.0.4")


def _engine_trouble(server: ServerState) -> str | None:
    if server.engine.is_ready:
        return None
    return "The engine is being started again." if server.engine.is_running else "The engine has stopped."


def _probe(trouble: str | None) -> Response:
    return Response() if trouble is None else PlainTextResponse(trouble, 503)


async def _raise_in_form(http: HTTPRequest, error: Exception) -> Response:
    """What the router refuses, as an error of the table."""
    assert isinstance(error, HTTPException)
    where = f"{http.method} {http.url.path}"
    if error.status_code == 405:
        raise MethodNotAllowedError(f"{where}: this path takes another method.", headers=error.headers)
    raise RouteNotFoundError(f"{where}: there is nothing here; /docs lists the routes.")
