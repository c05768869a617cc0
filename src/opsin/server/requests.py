"""The bodies that clients send. Unknown fields are ignored, as OpenAI's clients expect; wrong types are not.

``null`` means the same as leaving a field out.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

import msgspec

from opsin.errors import RequestError
from opsin.params import PoolingTask


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream tells beside the answer.

    Attributes:
        include_usage: a last chunk with the token counts.
        continuous_usage_stats: the counts so far in every chunk.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Request(msgspec.Struct, kw_only=True):
    """What every body may have; of it, what is about templates matters for conversations alone.

    Attributes:
        model: a name that the server goes by; its only model if left out.
        request_id: a name for the request, to become part of the answer's id.
        priority: lower runs first, where the engine schedules by priority.
        mm_processor_kwargs: settings of the picture processor.
        media_io_kwargs: which frames of videos to take.
        cache_salt: cached prompts are shared only under the same salt.
        chat_template: jinja text instead of the model's own; refused unless the server trusts its callers so far.
        continue_final_message: go on writing the last message instead of answering it.
    """

    model: str | None = None
    user: str | None = None
    request_id: str | None = None
    priority: int | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class SamplingRequest(Request, kw_only=True):
    """How to sample, as in ``opsin.SamplingParams``; fields left out come from the model's generation_config.json.

    Attributes:
        stream: send the answer while it grows, as server-sent events.
        response_format: OpenAI's way to ask for JSON: {"type": "json_object"}, or "json_schema" with its schema.
        structured_outputs: as ``opsin.params.StructuredOutputsParams``; those that begin with ``guided_`` are its
            former spelling. ``use_beam_search`` is not supported yet.
    """

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: bool | None = None


class ChatCompletionRequest(SamplingRequest, kw_only=True):
    """``POST /v1/chat/completions``.

    Attributes:
        messages: the conversation; content is text or a list of text and picture parts.
        max_completion_tokens: longest answer; ``max_tokens`` is its former name. By default what the context holds.
        logprobs: tell every token's log-probability, and those of ``top_logprobs`` alternatives.
        tools: functions that the model may ask to be called.
        tool_choice: "none", "auto", "required", or the one that must be called.
        parallel_tool_calls: false keeps the first call of an answer alone.
        echo: begin the answer with the last message, where that is the assistant's.
        documents: what the chat template may show the model beside the conversation.
        reasoning_effort: given to the chat template, as in ``chat_template_kwargs``.
    """

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    echo: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None


class CompletionRequest(SamplingRequest, kw_only=True):
    """``POST /v1/completions``.

    Attributes:
        prompt: text, token ids, or a list of either.
        logprobs: alternatives to tell per token.
        echo: begin the answer with the prompt; with ``logprobs``, tell the prompt's as well. ``max_tokens`` may then be
            0. ``suffix`` and ``best_of`` are not supported.
    """

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class VectorRequest(Request, kw_only=True):
    """What bodies have that ask for vectors, or for what follows from them.

    Attributes:
        truncate_prompt_tokens: not supported yet, but for -1, which is what the context holds.
    """

    truncate_prompt_tokens: int | None = None


class EmbeddingRequest(VectorRequest, kw_only=True):
    """``POST /v1/embeddings``: ``input``, or ``messages`` for one conversation with pictures.

    Attributes:
        encoding_format: numbers, or base64 of little-endian float32.
        dimensions: cut the vector to this length, before it is normalised.
    """

    input: str | list[str | int | list[int]] | None = None
    messages: list[dict[str, Any]] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class PoolingRequest(EmbeddingRequest, kw_only=True):
    """``POST /pooling``: as for embeddings.

    Attributes:
        task: "token_embed", the vectors of all tokens, or "embed", the last one's.
    """

    task: PoolingTask | None = None


class ClassifyRequest(Request, kw_only=True):
    """``POST /classify``, which no served architecture can answer."""


ScoreInput = str | dict[str, Any]
"""A text as it is, or ``{"content": text or parts}``, a user's message."""

ScoreInputs = str | dict[str, Any] | list[str | dict[str, Any]]


class ScoreRequest(VectorRequest, kw_only=True):
    """``POST /score``: two inputs or lists of them, under any of vLLM's pairs of names."""

    text_1: ScoreInputs | None = None
    text_2: ScoreInputs | None = None
    data_1: ScoreInputs | None = None
    data_2: ScoreInputs | None = None
    queries: ScoreInputs | None = None
    documents: ScoreInputs | None = None
    items: ScoreInputs | None = None


class RerankRequest(VectorRequest, kw_only=True):
    """``POST /rerank``.

    Attributes:
        top_n: results to give; 0 is all.
    """

    query: ScoreInput
    documents: ScoreInputs
    top_n: int | None = None


class PickRequest(Request, kw_only=True):
    """``POST /v1/pick``: ``question`` and ``image``, or ``messages``.

    Attributes:
        choices: 2 to 64 different answers, spelt as the model would give them.
        image: the URL of a picture, or a list of them.
    """

    choices: list[str]
    messages: list[dict[str, Any]] | None = None
    question: str | None = None
    image: str | list[str] | None = None


class TokenizeRequest(Request, kw_only=True):
    """``POST /tokenize``: ``prompt``, or ``messages``, whose pictures are expanded as for an answer.

    Attributes:
        tools: as in a chat; they cost tokens as well.
    """

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Request, kw_only=True):
    """``POST /detokenize``."""

    tokens: list[int]


T = TypeVar("T", bound=Request)

_MAX_MESSAGES = 4096
_MAX_VALUES = 250_000
_MAX_OBJECTS = 2**15
_MAX_DEPTH = 128
_MAX_SPANS = 256

_PATH = re.compile(r"(.*) - at `(?:key in )?\$(.*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


def decode(body: bytes | bytearray, kind: type[T]) -> T:
    """Read a JSON body.

    Raises:
        RequestError: it is not JSON in UTF-8, or a field has the wrong type; ``param`` is that field's path.
    """
    # Decoding holds up everybody else, and costs by the value, not by the byte. Quotes within strings are escaped, so
    # the roles are keys; the commas of prose count as well, of which no context holds so many. Counting in 8 MiB takes
    # 2 ms a sign and 12 ms for the roles, so what is nearly all of such a body is passed over.
    spans = _outside_pictures(body)

    def count(what: bytes) -> int:
        return sum(body.count(what, begin, end) for begin, end in spans)

    num_objects, num_lists = count(b"{"), count(b"[")
    if num_objects > _MAX_MESSAGES and count(b'"role"') > _MAX_MESSAGES:
        raise RequestError(f"The body has more than {_MAX_MESSAGES} messages.", param="messages")
    if count(b",") > _MAX_VALUES:
        raise RequestError(f"The body has more than {_MAX_VALUES} values.")
    if max(num_objects, num_lists) > _MAX_OBJECTS:
        raise RequestError(f"The body has more than {_MAX_OBJECTS} objects or lists.")
    try:
        request = msgspec.json.decode(body, type=kind)
        if num_objects + num_lists > _MAX_DEPTH:
            _check_depth(request)
        return request
    except msgspec.ValidationError as error:
        message, param = _located(str(error))
        raise RequestError(message, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"The body is not valid JSON in UTF-8: {error}") from None
    except RecursionError:
        raise RequestError("The body's JSON is nested too deeply.") from None


def _outside_pictures(body: bytes | bytearray) -> list[tuple[int, int]]:
    """Where a body is no data: URL. A quote before ``data:`` opens a string, or ends the JSON that can be read."""
    spans: list[tuple[int, int]] = []
    at = 0
    while len(spans) < _MAX_SPANS and (begin := body.find(b'"data:', at)) >= 0:
        spans.append((at, begin))
        at = body.find(b'"', begin + 1)
        if at < 0:
            return spans
    return [*spans, (at, len(body))]


def _check_depth(request: Request) -> None:
    """``RecursionError`` where something is nested too deeply for those who will walk it."""
    level: list[Any] = [getattr(request, name) for name in request.__struct_fields__]
    for _ in range(_MAX_DEPTH):
        outer = [value.values() if type(value) is dict else value for value in level if type(value) in (dict, list)]
        level = [inner for values in outer for inner in values if type(inner) in (dict, list)]
        if not level:
            return
    raise RecursionError


def _located(message: str) -> tuple[str, str | None]:
    """msgspec's message taken apart: what is wrong, and where, as ``messages.0.content``."""
    match = _PATH.match(message)
    if match is None:
        missing = re.search(r"missing required field `(.+)`", message)
        return f"{message}.", missing[1] if missing else None
    steps = [name or index for name, index in _STEP.findall(match[2])]
    path = ".".join(step for step in steps if step != "...")
    return f"{path or 'The body'}: {match[1]}.", path or None
