"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from msgspec import UNSET, UnsetType
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.outputs import CompletionOutput, RequestOutput
from opsin.params import SamplingParams
from opsin.processing.processor import ProcessedRequest
from opsin.server.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Usage,
)
from opsin.server.beams import beams_for
from opsin.server.constraints import blame_form, field_of
from opsin.server.errors import ErrorBody
from opsin.server.generation import DATA, Form, respond
from opsin.server.logprobs import chat_logprobs, prompt_logprobs
from opsin.server.requests import ChatCompletionRequest
from opsin.server.sampling import refuse_unsupported, sampling_params
from opsin.server.state import ServerState, Telling, blame
from opsin.server.tools import CallCollector, ToolUse, tool_use


async def create_chat_completion(http: HTTPRequest, server: ServerState) -> Response:
    """Answer one conversation."""
    request = await server.read(http, ChatCompletionRequest)

    def new_form(name: str, params: SamplingParams, use: ToolUse) -> Form:
        return _ChatForm(name, server.names[0], params.n, params.logprobs, use, _echo(request), server.telling(request))

    return await answer_chat(http, server, request, server.name_of(http, request, "chatcmpl"), new_form)


async def answer_chat(
    http: HTTPRequest,
    server: ServerState,
    request: ChatCompletionRequest,
    name: str,
    new_form: Callable[[str, SamplingParams, ToolUse], Form],
) -> Response:
    """Answer a conversation in some form.

    Args:
        name: the answer's id.
        new_form: makes the form of id, parameters and tools.

    Raises:
        OpsinError: it cannot be answered.
    """
    plan = plan_chat(server, request, name)
    # A picture that turns out to be broken when it is decoded is the messages' fault, if it is not known which.
    with blame_form(plan.form_field), blame("messages"):
        return await respond(
            http,
            server,
            new_form(name, plan.params, plan.use),
            plan.prepare,
            num_answers=plan.params.n,
            stream=bool(request.stream),
            options=server.stream_options(request.stream_options),
            engine=beams_for(request, plan.params, server.engine),
        )


class ChatPlan(NamedTuple):
    """How a conversation is to be answered.

    Attributes:
        use: how tools are used.
        form_field: the body's field that asks for a form.
        prepare: makes the engine's request.
    """

    params: SamplingParams
    use: ToolUse
    form_field: str
    prepare: Callable[[], Awaitable[list[ProcessedRequest]]]


def plan_chat(server: ServerState, request: ChatCompletionRequest, name: str) -> ChatPlan:
    """Read how a conversation is to be answered.

    Args:
        name: the answer's id.

    Raises:
        RequestError: what is wrong.
    """
    refuse_unsupported(request)
    engine = server.engine
    params = sampling_params(request, engine.get_default_sampling_params(max_tokens=None), engine.max_model_len)
    use = tool_use(request, server.tool_parser)
    if request.tool_choice == "none" and server.config.exclude_tools_when_tool_choice_none:
        use = ToolUse()
    use.apply_to(params)
    if request.reasoning_effort is not None:
        effort = {"reasoning_effort": request.reasoning_effort}
        request.chat_template_kwargs = effort | (request.chat_template_kwargs or {})

    async def prepare() -> list[ProcessedRequest]:
        return [
            await server.prepare_chat(
                name,
                request,
                request.messages,
                params,
                add_generation_prompt=True,
                tools=use.tools,
                documents=request.documents,
            )
        ]

    return ChatPlan(params, use, field_of(request) if use.constraint is None else "tools", prepare)


def _echo(request: ChatCompletionRequest) -> str:
    """What answers begin with: the last message, where the assistant had begun it and ``echo`` is asked for."""
    last = request.messages[-1] if request.echo and request.messages else {}
    content: Any = last.get("content") if last.get("role") == "assistant" else None
    parts: list[Any] = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


class _ChatForm:
    """Chat completions and their chunks.

    Args:
        top: alternatives to tell per token; None tells no log-probabilities.
        use: how the answers are read for tool calls.
        echo: what stands in front of every answer.
        telling: how ids are told.
    """

    framing = DATA

    def __init__(
        self, name: str, model: str, n: int, top: int | None, use: ToolUse, echo: str, telling: Telling
    ) -> None:
        self._name = name
        self._model = model
        self._n = n
        self._top = top
        self._use = use
        self._echo = echo
        self._telling = telling
        self._tells_prompt = telling.token_ids  # it was not told yet
        self._collectors = [CallCollector(use) for _ in range(n)]
        self._created = int(time.time())

    def opening(self) -> list[ChatChunk]:
        first = ChatDelta(role="assistant", content=self._echo)
        return [self._chunk([ChatChunkChoice(i, first)], UNSET) for i in range(self._n)]

    def events(self, prompt: int, output: RequestOutput, usage: Usage | UnsetType | None) -> list[ChatChunk]:
        choices = [
            ChatChunkChoice(
                answer.index,
                self._delta(answer),
                self._logprobs(answer),
                self._finish_reason(answer),
                UNSET if answer.finish_reason is None else answer.stop_reason,
                answer.token_ids if self._telling.token_ids else UNSET,
            )
            for answer in output.outputs
        ]
        chunk = self._chunk(choices, usage)
        if self._tells_prompt:
            chunk.prompt_token_ids, self._tells_prompt = output.prompt_token_ids, False
        return [chunk]

    def _delta(self, answer: CompletionOutput) -> ChatDelta:
        content, calls = self._collectors[answer.index].take(answer.text, answer.finish_reason is not None)
        return ChatDelta(
            content=content if content or self._use.new_parser is None else UNSET, tool_calls=calls or UNSET
        )

    def _message(self, answer: CompletionOutput) -> ChatMessage:
        content, calls = self._collectors[answer.index].take(answer.text, ended=True)
        content = self._echo + content
        for call in calls:
            call.index = UNSET
        return ChatMessage(content if content or not calls else None, tool_calls=calls or UNSET)

    def _finish_reason(self, answer: CompletionOutput) -> str | None:
        """As the answer says, but for calls; asked after its text was taken."""
        calls = self._collectors[answer.index].num_calls > 0
        return self._use.finish_reason if calls and answer.finish_reason == "stop" else answer.finish_reason

    def closing(self, usage: Usage, *, tell_usage: bool) -> list[ChatChunk]:
        return [self._chunk([], usage)] if tell_usage else []

    def failure(self, body: ErrorBody) -> ErrorBody:
        return body

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> ChatCompletion:
        (output,) = outputs
        choices = [
            ChatChoice(
                answer.index,
                self._message(answer),
                self._logprobs(answer),
                self._finish_reason(answer),
                answer.stop_reason,
                answer.token_ids if self._telling.token_ids else UNSET,
            )
            for answer in output.outputs
        ]
        told = UNSET if output.prompt_logprobs is None else prompt_logprobs(output.prompt_logprobs)
        ids = output.prompt_token_ids if self._telling.token_ids else UNSET
        return ChatCompletion(
            self._name, self._created, self._model, choices, usage, prompt_logprobs=told, prompt_token_ids=ids
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(self._name, self._created, self._model, choices, usage=usage)

    def _logprobs(self, answer: CompletionOutput) -> ChatLogprobs | None:
        if self._top is None or answer.logprobs is None:
            return None
        return chat_logprobs(answer.token_ids, answer.logprobs, self._top, by_id=self._telling.names_ids)
