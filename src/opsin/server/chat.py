"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

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
    CompletionTokensDetails,
    ToolCallAnswer,
    Usage,
)
from opsin.server.beams import beams_for
from opsin.server.constraints import blame_form, field_of
from opsin.server.errors import ErrorBody
from opsin.server.generation import DATA, Form, respond
from opsin.server.logprobs import chat_logprobs, prompt_logprobs
from opsin.server.reasoning import Reasoning, ReasoningReader
from opsin.server.requests import ChatCompletionRequest
from opsin.server.sampling import refuse_unsupported, sampling_params
from opsin.server.state import ServerState, Telling, blame
from opsin.server.tools import CallCollector, ToolUse, tool_use


async def create_chat_completion(http: HTTPRequest, server: ServerState) -> Response:
    """Answer one conversation."""
    request = await server.read(http, ChatCompletionRequest)
    echo = _last_words(request) if request.echo else ""
    reasoning = reasoning_of(server, request)

    def new_form(name: str, params: SamplingParams, use: ToolUse) -> Form:
        model, telling = server.names[0], server.telling(request)
        return _ChatForm(name, model, params.n, params.logprobs, use, reasoning, echo, telling)

    return await answer_chat(http, server, request, server.name_of(http, request, "chatcmpl"), new_form, reasoning)


async def answer_chat(
    http: HTTPRequest,
    server: ServerState,
    request: ChatCompletionRequest,
    name: str,
    new_form: Callable[[str, SamplingParams, ToolUse], Form],
    reasoning: Reasoning | None = None,
) -> Response:
    """Answer a conversation in some form.

    Args:
        name: the answer's id.
        new_form: makes the form of id, parameters and tools.
        reasoning: what the form tells apart.

    Raises:
        OpsinError: it cannot be answered.
    """
    plan = plan_chat(server, request, name, reasoning)
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


def plan_chat(
    server: ServerState, request: ChatCompletionRequest, name: str, reasoning: Reasoning | None = None
) -> ChatPlan:
    """Read how a conversation is to be answered.

    Args:
        name: the answer's id.
        reasoning: thoughts that may come before an answer, and before the form that it must have.

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
        if reasoning is not None:
            await reasoning.apply_to(params)
        processed = await server.prepare_chat(
            name,
            request,
            request.messages,
            params,
            add_generation_prompt=True,
            tools=use.tools,
            documents=request.documents,
        )
        if reasoning is not None:
            reasoning.look_at(processed)
        return [processed]

    return ChatPlan(params, use, field_of(request) if use.constraint is None else "tools", prepare)


def reasoning_of(server: ServerState, request: ChatCompletionRequest) -> Reasoning | None:
    """How thoughts are told apart in the answers to a request; None where they are not."""
    if server.reasoning is None:
        return None
    continued = _last_words(request) if request.continue_final_message else None
    return Reasoning(server.reasoning, continued, request.include_reasoning is not False)


def _last_words(request: ChatCompletionRequest) -> str:
    """The text of the last message, where it is the assistant's."""
    last = request.messages[-1] if request.messages else {}
    content: Any = last.get("content") if last.get("role") == "assistant" else None
    parts: list[Any] = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


_MaybeUsage = TypeVar("_MaybeUsage", bound=Usage | UnsetType | None)


class _ChatForm:
    """Chat completions and their chunks.

    Args:
        top: alternatives to tell per token; None tells no log-probabilities.
        use: how the answers are read for tool calls.
        reasoning: what the model thinks before it answers, where that is told apart.
        echo: what stands in front of every answer.
        telling: how ids are told.
    """

    framing = DATA

    def __init__(
        self,
        name: str,
        model: str,
        n: int,
        top: int | None,
        use: ToolUse,
        reasoning: Reasoning | None,
        echo: str,
        telling: Telling,
    ) -> None:
        self._name = name
        self._model = model
        self._n = n
        self._top = top
        self._use = use
        self._reasoning = reasoning
        self._readers: dict[int, ReasoningReader] = {}
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
        if self._reasoning is not None:  # thoughts may be long, and clients may not want them
            choices = [choice for choice in choices if _has_news(choice)]
        chunk = self._chunk(choices, self._told(usage))
        if self._tells_prompt:
            chunk.prompt_token_ids, self._tells_prompt = output.prompt_token_ids, False
        elif not choices and not isinstance(usage, Usage):
            return []
        return [chunk]

    def _read(self, answer: CompletionOutput, ended: bool) -> tuple[str, str, list[ToolCallAnswer]]:
        """What has become certain of an answer: more of the thoughts before it, of its content, and further calls."""
        thought, text = "", answer.text
        if self._reasoning is not None:
            reader = self._readers.get(answer.index) or self._reasoning.new_reader()
            self._readers[answer.index] = reader
            thought, text = reader.take(text, answer.token_ids, ended)
            thought = thought if self._reasoning.is_told else ""
            if not reader.has_answer:  # nor has a call come
                return thought, "", []
        return thought, *self._collectors[answer.index].take(text, ended)

    def _delta(self, answer: CompletionOutput) -> ChatDelta:
        thought, content, calls = self._read(answer, answer.finish_reason is not None)
        is_plain = self._use.new_parser is None and self._reasoning is None
        return ChatDelta(
            content=content if content or is_plain else UNSET, tool_calls=calls or UNSET, reasoning=thought or UNSET
        )

    def _message(self, answer: CompletionOutput) -> ChatMessage:
        thought, content, calls = self._read(answer, ended=True)
        content = self._echo + content
        for call in calls:
            call.index = UNSET
        is_plain = not calls and self._reasoning is None
        tells = self._reasoning is not None and self._reasoning.is_told
        return ChatMessage(
            content if content or is_plain else None,
            tool_calls=calls or UNSET,
            reasoning=thought or None if tells else UNSET,
        )

    def _finish_reason(self, answer: CompletionOutput) -> str | None:
        """As the answer says, but for calls; asked after its text was taken."""
        calls = self._collectors[answer.index].num_calls > 0
        return self._use.finish_reason if calls and answer.finish_reason == "stop" else answer.finish_reason

    def closing(self, usage: Usage, *, tell_usage: bool) -> list[ChatChunk]:
        return [self._chunk([], self._told(usage))] if tell_usage else []

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
        usage = self._told(usage)
        return ChatCompletion(
            self._name, self._created, self._model, choices, usage, prompt_logprobs=told, prompt_token_ids=ids
        )

    def _told(self, usage: _MaybeUsage) -> _MaybeUsage:
        """The counts, with what was thought."""
        counts = [reader.num_tokens for reader in self._readers.values()]
        if isinstance(usage, Usage) and counts and None not in counts:
            usage.completion_tokens_details = CompletionTokensDetails(sum(filter(None, counts)))
        return usage

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(self._name, self._created, self._model, choices, usage=usage)

    def _logprobs(self, answer: CompletionOutput) -> ChatLogprobs | None:
        if self._top is None or answer.logprobs is None:
            return None
        return chat_logprobs(answer.token_ids, answer.logprobs, self._top, by_id=self._telling.names_ids)


def _has_news(choice: ChatChunkChoice) -> bool:
    """Whether a part of a stream tells anything."""
    delta = choice.delta
    told = (delta.content, delta.reasoning, delta.tool_calls, choice.logprobs, choice.finish_reason, choice.token_ids)
    return any(told)
