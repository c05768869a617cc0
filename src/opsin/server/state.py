"""What the handlers of one application share, and the first steps that all of them take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request as HTTPRequest

from opsin.errors import RequestError
from opsin.params import PoolingParams, SamplingParams
from opsin.processing.processor import ProcessedRequest
from opsin.server.admission import Admission
from opsin.server.client import EngineClient
from opsin.server.config import ServerConfig
from opsin.server.decoding import decode
from opsin.server.errors import ModelNotFoundError
from opsin.server.gate import request_id_from
from opsin.server.metrics import Metrics
from opsin.server.reasoning import ModelReasoning
from opsin.server.remembered import RememberedMedia
from opsin.server.requests import Request, SamplingRequest, StreamOptions
from opsin.server.tools import check_size
from opsin.server.transport import read_body

T = TypeVar("T", bound=Request)


class Telling(NamedTuple):
    """What an answer tells of tokens.

    Attributes:
        token_ids: the ids of the prompt and of the answer.
        names_ids: tokens of log-probabilities are named by their ids.
    """

    token_ids: bool
    names_ids: bool


@dataclass(slots=True)
class ServerState:
    """One server.

    Attributes:
        names: what the model goes by; the first is told in answers.
        root: what the engine calls it.
        created: when the server started, in Unix time.
        tool_parser: the form in which the model writes tool calls by itself, where it is known.
        reasoning: how the model thinks before it answers, where that is told apart.
    """

    engine: EngineClient
    config: ServerConfig
    admission: Admission
    metrics: Metrics
    names: Sequence[str]
    root: str
    created: int = field(default_factory=lambda: int(time.time()))
    counter: itertools.count[int] = field(default_factory=itertools.count)
    tool_parser: str | None = None
    reasoning: ModelReasoning | None = None
    remembered: RememberedMedia = field(default_factory=RememberedMedia)

    async def read(self, http: HTTPRequest, kind: type[T]) -> T:
        """Read and decode a body, and see that it asks for the model that is here.

        Raises:
            HTTPError, RequestError: it cannot be read, or asks for another model.
        """
        body = await read_body(http, self.config.max_body_bytes)
        request = decode(body.text, kind, body.strings)
        if request.model is not None:
            self.require_model(request.model)
        if request.chat_template is not None and not self.config.trust_request_chat_template:
            raise RequestError(
                "This server takes no chat_template from requests (trust_request_chat_template).",
                param="chat_template",
            )
        if request.chat_template is not None and not ("{{" in request.chat_template or "{%" in request.chat_template):
            raise RequestError("chat_template must be jinja text.", param="chat_template")  # and never a path
        messages = getattr(request, "messages", None)
        if messages:
            client = http.scope["state"].get("client", "")
            request.messages = self.remembered.resolve(messages, client, request.cache_salt or "")  # type: ignore[attr-defined]
        return request

    def require_model(self, name: str) -> None:
        """See that the model goes by a name.

        Raises:
            ModelNotFoundError: it does not.
        """
        if name not in self.names:
            raise ModelNotFoundError(
                f"The model {name!r:.200} does not exist here. Served: {', '.join(self.names)}.", param="model"
            )

    def name_of(self, http: HTTPRequest, request: Request, prefix: str, joint: str = "-") -> str:
        """The id of an answer: from the body, from the X-Request-Id header, or a new one."""
        return f"{prefix}{joint}{request_id_from(request.request_id or http.scope['state']['request_id'])}"

    def telling(self, request: SamplingRequest) -> Telling:
        """What an answer tells of tokens."""
        names = request.return_tokens_as_token_ids
        by_default = self.config.return_tokens_as_token_ids
        return Telling(bool(request.return_token_ids), by_default if names is None else names)

    def stream_options(self, given: StreamOptions | None) -> StreamOptions:
        """What a stream tells beside its answer."""
        options = given or StreamOptions()
        if self.config.enable_force_include_usage:
            options.include_usage = True
        return options

    def engine_id(self, name: str) -> str:
        """An id for the engine, where two requests must not have the same, whatever their clients call them."""
        return f"{name}-{next(self.counter)}"

    async def prepare_chat(
        self,
        name: str,
        request: Request,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | PoolingParams,
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> ProcessedRequest:
        """Render a conversation, fetch its pictures and check it all.

        Raises:
            RequestError, MediaError: what is wrong.
        """
        if tools:
            check_size(tools)
        given = request.add_generation_prompt
        continues = bool(request.continue_final_message)
        with blame("messages"):
            return await self.engine.prepare_chat(
                messages,
                params,
                self.engine_id(name),
                priority=request.priority or 0,
                chat_template=request.chat_template,
                chat_template_content_format=self.config.chat_template_content_format,
                isolate_template=True,
                chat_template_kwargs={
                    **self.config.default_chat_template_kwargs,
                    **(request.chat_template_kwargs or {}),
                },
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt and not continues if given is None else given,
                continue_final_message=continues,
                mm_processor_kwargs=request.mm_processor_kwargs,
                media_io_kwargs=request.media_io_kwargs,
                add_special_tokens=request.add_special_tokens,
                cache_salt=request.cache_salt or "",
            )

    async def prepare(
        self, name: str, request: Request, prompt: str | list[int], params: SamplingParams | PoolingParams, field: str
    ) -> ProcessedRequest:
        """Tokenise and check a prompt without pictures.

        Args:
            field: where the body has it.

        Raises:
            RequestError: what is wrong.
        """
        special = request.add_special_tokens is not False
        salt = request.cache_salt or None
        with blame(field):
            return await self.engine.prepare(
                {"prompt": prompt, "cache_salt": salt, "add_special_tokens": special}
                if isinstance(prompt, str)
                else {"prompt_token_ids": prompt, "cache_salt": salt},
                params,
                self.engine_id(name),
                priority=request.priority or 0,
                mm_processor_kwargs=request.mm_processor_kwargs,
            )


@contextmanager
def blame(field: str) -> Iterator[None]:
    """Give errors about a prompt the name of the body's field that it came from."""
    try:
        yield
    except RequestError as error:
        if error.param in (None, "prompt", "prompt_token_ids") or error.param.startswith("multi_modal_data"):
            error.param = field
        raise


@contextmanager
def renamed(field: str) -> Iterator[None]:
    """Give errors about the one message that was made of a body's field the field's own name.

    Args:
        field: what the message's content came from.
    """
    try:
        yield
    except RequestError as error:
        if error.param is not None and error.param.startswith("messages"):
            error.param = field
        raise


def prompts_of(given: str | list[str | int | list[int]] | None, param: str) -> list[str | list[int]]:
    """OpenAI's forms of several prompts to a list: text, ids, a list of texts, a list of lists of ids.

    Raises:
        RequestError: none of these, or empty.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError(f"{param} must be text, token ids, or a non-empty list of either.", param=param)
    ids = [item for item in given if isinstance(item, int)]
    if len(ids) == len(given):
        return [ids]
    if ids:
        raise RequestError(f"{param} mixes token ids with whole prompts; send either.", param=param)
    return [item for item in given if not isinstance(item, int)]
