"""From a body's fields to ``SamplingParams``, and the refusal of what is not there yet."""

from __future__ import annotations

from typing import Any

import msgspec

from opsin.errors import RequestError
from opsin.params import SamplingParams
from opsin.server.constraints import constraint_of
from opsin.server.requests import ChatCompletionRequest, CompletionRequest, SamplingRequest

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

_SAME_NAMES = tuple(
    name for name in SamplingParams.__struct_fields__ if name in SamplingRequest.__struct_fields__ and name != "stop"
)


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != []


_NOT_YET = ("functions", "function_call", "audio", "suffix", "thinking_token_budget")
"""Fields that would change the answer, to ignore them would be to answer something else."""


def refuse_unsupported(request: SamplingRequest) -> None:
    """Refuse what is not implemented yet.

    Raises:
        RequestError: ``param`` is the field.
    """
    for name in _NOT_YET:
        if _is_set(getattr(request, name, None)):
            raise RequestError(f"{name} is not supported yet; leave it out.", param=name)
    if isinstance(request, ChatCompletionRequest) and request.modalities not in (None, [], ["text"]):
        raise RequestError("Only the modality 'text' can be produced.", param="modalities")
    if isinstance(request, CompletionRequest) and request.best_of not in (None, request.n or 1):
        raise RequestError("best_of is not supported yet; leave it out, or let it equal n.", param="best_of")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options may be given only with stream.", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed; leave out stream.", param="prompt_logprobs")


def sampling_params(
    request: ChatCompletionRequest | CompletionRequest, defaults: SamplingParams, max_model_len: int
) -> SamplingParams:
    """The parameters of one request.

    Args:
        defaults: what the model's generation_config.json asks for.
        max_model_len: what the context holds.

    Raises:
        RequestError: a value out of range; ``param`` is the body's own field.
    """
    given = {name: getattr(request, name) for name in _SAME_NAMES if getattr(request, name) is not None}
    given["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop or []
    names: dict[str, str] = {}  # what a parameter is called in the body, where it is called otherwise
    if isinstance(request, ChatCompletionRequest):
        if request.max_completion_tokens is not None:
            given["max_tokens"] = request.max_completion_tokens
            names["max_tokens"] = "max_completion_tokens"
        if request.top_logprobs is not None and not request.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        given["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
        names["logprobs"] = "top_logprobs"
    else:
        given.setdefault("max_tokens", _DEFAULT_COMPLETION_TOKENS)
        given["logprobs"] = request.logprobs
    if request.truncate_prompt_tokens == -1:  # vLLM's word for what the context holds beside the answer
        longest = given.get("max_tokens", defaults.max_tokens) or 1
        if longest >= max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens is -1, but an answer of {longest} tokens leaves nothing of this model's "
                f"context of {max_model_len} to the prompt; ask for fewer.",
                param=names.get("max_tokens", "max_tokens"),
            )
        given["truncate_prompt_tokens"] = max_model_len - longest
    given["structured_outputs"] = constraint_of(request)
    try:
        return msgspec.structs.replace(defaults, **given)
    except RequestError as error:
        name = names.get(error.param or "", error.param)
        message = str(error).replace(f"{error.param} is", f"{name} is", 1)
        raise RequestError(message, code=error.code, param=name) from None
