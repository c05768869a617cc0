"""The bodies that clients send. Unknown fields are ignored, as OpenAI's clients expect; wrong types are not.

``null`` means the same as leaving a field out.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

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
        add_special_tokens: put the tokenizer's own before the prompt. By default they are, in conversations only where
            the template has not written the first of them.
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
    add_special_tokens: bool | None = None
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
        truncate_prompt_tokens: keep so many of the prompt's tokens, the last ones; -1 keeps what the context holds.
        response_format: OpenAI's way to ask for JSON: {"type": "json_object"}, or "json_schema" with its schema.
        return_token_ids: tell the prompt's tokens and the answer's, by their ids.
        return_tokens_as_token_ids: name the tokens of log-probabilities by their ids, as in "token_id:42".
        structured_outputs: as ``opsin.params.StructuredOutputsParams``; those that begin with ``guided_`` are its
            former spelling.
        use_beam_search: search for the ``n`` likeliest answers instead of drawing them.
        length_penalty: for the search; above 0 it favours long answers.
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
    length_penalty: float | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


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
        include_reasoning: false leaves out what the model thinks before it answers, where the server tells it apart.
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
    include_reasoning: bool | None = None
    thinking_token_budget: Any = None
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
        encoding_format: "float" for numbers, "base64" or "bytes"; the header ``metadata`` then says where in the body
            which vector is, but with "bytes_only".
        embed_dtype: how base64 and bytes write a number; float32 by default.
        endianness: in which order its bytes are; the machine's own by default.
        dimensions: cut the vector to this length, before it is normalised.
    """

    input: str | list[str | int | list[int]] | None = None
    messages: list[dict[str, Any]] | None = None
    encoding_format: Literal["float", "base64", "bytes", "bytes_only"] | None = None
    embed_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    endianness: Literal["native", "little", "big"] | None = None
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
        images: another name of ``image``: the one that ``LLM.pick`` uses.
    """

    choices: list[str]
    messages: list[dict[str, Any]] | None = None
    question: str | None = None
    image: str | list[str] | None = None
    images: str | list[str] | None = None


class TokenizeRequest(Request, kw_only=True):
    """``POST /tokenize``: ``prompt``, or ``messages``, whose pictures are expanded as for an answer.

    Attributes:
        tools: as in a chat; they cost tokens as well.
    """

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(Request, kw_only=True):
    """``POST /detokenize``."""

    tokens: list[int]
