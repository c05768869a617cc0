"""``POST /v1/completions``: prompts in the model's own format."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from msgspec import UnsetType
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.errors import RequestError
from opsin.outputs import CompletionOutput, Logprob, RequestOutput
from opsin.params import MAX_N, SamplingParams
from opsin.processing.processor import ProcessedRequest
from opsin.server.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from opsin.server.beams import beams_for
from opsin.server.constraints import blame_form, field_of
from opsin.server.errors import ErrorBody
from opsin.server.generation import DATA, respond
from opsin.server.logprobs import completion_logprobs, prompt_logprobs
from opsin.server.requests import CompletionRequest
from opsin.server.sampling import refuse_unsupported, sampling_params
from opsin.server.state import ServerState, Telling, prompts_of

_MAX_ANSWERS = 8 * MAX_N


async def create_completion(http: HTTPRequest, server: ServerState) -> Response:
    """Go on writing one prompt or several."""
    request = await server.read(http, CompletionRequest)
    name = server.name_of(http, request, "cmpl")
    params, num_prompts, echo, prepare = plan_completion(server, request, name)
    with blame_form(field_of(request)):
        return await respond(
            http,
            server,
            _CompletionForm(name, server.names[0], params.n, params.logprobs, echo, server.telling(request)),
            prepare,
            num_answers=num_prompts * params.n,
            stream=bool(request.stream),
            options=server.stream_options(request.stream_options),
            engine=beams_for(request, params, server.engine),
        )


class CompletionPlan(NamedTuple):
    """How prompts are to be gone on with.

    Attributes:
        echo: their own text, where it is asked for; ``prepare`` reads it.
        prepare: makes the engine's requests.
    """

    params: SamplingParams
    num_prompts: int
    echo: _Echo | None
    prepare: Callable[[], Awaitable[list[ProcessedRequest]]]


def plan_completion(server: ServerState, request: CompletionRequest, name: str) -> CompletionPlan:
    """Read how prompts are to be gone on with.

    Args:
        name: the answer's id.

    Raises:
        RequestError: what is wrong.
    """
    refuse_unsupported(request)
    only_echo = bool(request.echo) and request.max_tokens == 0
    if only_echo:
        request.max_tokens = 1  # drawn, and not shown
    params = sampling_params(request, server.engine.get_default_sampling_params(), server.engine.max_model_len)
    if request.echo and params.logprobs is not None:
        params.prompt_logprobs = params.logprobs
    prompts = prompts_of(request.prompt, "prompt")
    num_answers = len(prompts) * params.n
    if num_answers > _MAX_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts with n={params.n} are {num_answers} answers; at most {_MAX_ANSWERS} may be asked "
            "for at once.",
            param="prompt",
        )
    echo: _Echo | None = _Echo(only_echo) if request.echo else None

    async def prepare() -> list[ProcessedRequest]:
        prepared = [await server.prepare(name, request, prompt, params, "prompt") for prompt in prompts]
        if echo is not None:
            await echo.read(server, prompts, prepared)
        return prepared

    return CompletionPlan(params, len(prompts), echo, prepare)


class _Echo:
    """The prompts' own text, in front of their answers.

    Attributes:
        alone: the answers are left out.
        texts: by prompt.
        tokens: by prompt, the text of its first token, which no log-probability names.
    """

    def __init__(self, alone: bool) -> None:
        self.alone = alone
        self.texts: list[str] = []
        self.tokens: list[str] = []

    async def read(
        self, server: ServerState, prompts: Sequence[str | list[int]], prepared: Sequence[ProcessedRequest]
    ) -> None:
        for prompt, processed in zip(prompts, prepared, strict=True):
            self.texts.append(prompt if isinstance(prompt, str) else await server.engine.detokenize(prompt))
            self.tokens.append(await server.engine.detokenize(processed.request.prompt_token_ids[:1]))


class _CompletionForm:
    """Completions and their chunks, which have the same shape.

    Args:
        top: alternatives to tell per token; None tells no log-probabilities.
        echo: what stands in front of every answer.
        telling: how ids are told.
    """

    framing = DATA

    def __init__(self, name: str, model: str, n: int, top: int | None, echo: _Echo | None, telling: Telling) -> None:
        self._name = name
        self._model = model
        self._n = n
        self._top = top
        self._echo = echo
        self._echoed: set[int] = set()
        self._telling = telling
        self._begun: set[int] = set()  # answers with which the prompt's ids were told
        self._created = int(time.time())
        self._num_chars: dict[int, int] = {}

    def opening(self) -> list[Completion]:
        return []

    def events(self, prompt: int, output: RequestOutput, usage: Usage | UnsetType | None) -> list[Completion]:
        return [self._body([self._choice(prompt, output, answer) for answer in output.outputs], usage)]

    def closing(self, usage: Usage, *, tell_usage: bool) -> list[Completion]:
        return [self._body([], usage)] if tell_usage else []

    def failure(self, body: ErrorBody) -> ErrorBody:
        return body

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Completion:
        choices: list[CompletionChoice] = []
        for prompt, output in enumerate(outputs):
            for answer in output.outputs:
                choices.append(self._choice(prompt, output, answer))
                if output.prompt_logprobs is not None:
                    choices[-1].prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return self._body(choices, usage)

    def _body(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self._name, self._created, self._model, choices, usage=usage)

    def _choice(self, prompt: int, output: RequestOutput, answer: CompletionOutput) -> CompletionChoice:
        index = prompt * self._n + answer.index
        text, ids = answer.text, answer.token_ids
        positions: list[dict[int, Logprob] | None] = list(answer.logprobs or ())
        if self._echo is not None and self._echo.alone:
            text, ids, positions = "", [], []
        first = ""
        if self._echo is not None and index not in self._echoed:
            self._echoed.add(index)
            text = self._echo.texts[prompt] + text
            if output.prompt_logprobs is not None:
                first = self._echo.tokens[prompt]
                ids, positions = output.prompt_token_ids + ids, [*output.prompt_logprobs, *positions]
        logprobs: CompletionLogprobs | None = None
        if self._top is not None and answer.logprobs is not None:
            offset, by_id = self._num_chars.get(index, 0), self._telling.names_ids
            logprobs, offset = completion_logprobs(ids, positions, self._top, offset, first, by_id=by_id)
            self._num_chars[index] = offset
        choice = CompletionChoice(index, text, logprobs, answer.finish_reason, answer.stop_reason)
        if self._telling.token_ids:
            choice.token_ids = [] if self._echo is not None and self._echo.alone else answer.token_ids
            if index not in self._begun:
                self._begun.add(index)
                choice.prompt_token_ids = output.prompt_token_ids
        return choice
