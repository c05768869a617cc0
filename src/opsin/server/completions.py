"""``POST /v1/completions``: prompts in the model's own format."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec import UNSET, UnsetType
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.errors import RequestError
from opsin.outputs import CompletionOutput, RequestOutput
from opsin.params import MAX_N
from opsin.processing.processor import ProcessedRequest
from opsin.server.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from opsin.server.generation import respond
from opsin.server.logprobs import completion_logprobs, prompt_logprobs
from opsin.server.requests import CompletionRequest
from opsin.server.sampling import refuse_unsupported, sampling_params
from opsin.server.state import ServerState, prompts_of

_MAX_ANSWERS = 8 * MAX_N


async def create_completion(http: HTTPRequest, server: ServerState) -> Response:
    """Go on writing one prompt or several."""
    request = await server.read(http, CompletionRequest)
    refuse_unsupported(request)
    params = sampling_params(request, server.engine.get_default_sampling_params())
    prompts = prompts_of(request.prompt, "prompt")
    num_answers = len(prompts) * params.n
    if num_answers > _MAX_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts with n={params.n} are {num_answers} answers; at most {_MAX_ANSWERS} may be asked "
            "for at once.",
            param="prompt",
        )
    name = server.name_of(http, request, "cmpl")

    async def prepare() -> list[ProcessedRequest]:
        return [await server.prepare(name, request, prompt, params, "prompt") for prompt in prompts]

    return await respond(
        http,
        server,
        _CompletionForm(name, server.names[0], params.n, params.logprobs),
        prepare,
        num_answers=num_answers,
        stream=bool(request.stream),
        options=request.stream_options,
    )


class _CompletionForm:
    """Completions and their chunks, which have the same shape.

    Args:
        top: alternatives to tell per token; None tells no log-probabilities.
    """

    def __init__(self, name: str, model: str, n: int, top: int | None) -> None:
        self._name = name
        self._model = model
        self._n = n
        self._top = top
        self._created = int(time.time())
        self._num_chars: dict[int, int] = {}

    def opening(self) -> list[Completion]:
        return []

    def event(self, prompt: int, output: RequestOutput, usage: Usage | UnsetType | None) -> Completion:
        return self._body([self._choice(prompt, answer) for answer in output.outputs], usage)

    def closing(self, usage: Usage) -> Completion:
        return self._body([], usage)

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Completion:
        choices: list[CompletionChoice] = []
        for prompt, output in enumerate(outputs):
            for answer in output.outputs:
                choices.append(self._choice(prompt, answer))
                if output.prompt_logprobs is not None:
                    choices[-1].prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return self._body(choices, usage)

    def _body(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self._name, self._created, self._model, choices, usage=usage)

    def _choice(self, prompt: int, answer: CompletionOutput) -> CompletionChoice:
        index = prompt * self._n + answer.index
        logprobs: CompletionLogprobs | None = None
        if self._top is not None and answer.logprobs is not None:
            offset = self._num_chars.get(index, 0)
            logprobs = completion_logprobs(answer.token_ids, answer.logprobs, self._top, offset)
            self._num_chars[index] = offset + sum(len(token) for token in logprobs.tokens)
        return CompletionChoice(index, answer.text, logprobs, answer.finish_reason, answer.stop_reason, UNSET)
