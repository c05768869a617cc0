"""The bodies that clients get, in OpenAI's form. Fields set to UNSET are left out."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct):
    """What the prompt's tokens were: found in the prefix cache, and standing for pictures."""

    cached_tokens: int
    multimodal_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    """What the answers' tokens were: thought before the answer."""

    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Token counts; ``prompt_tokens`` is the prompt's length with its pictures expanded."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TokenAlternative(msgspec.Struct):
    """A token that might have come; ``bytes`` is its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenAlternative):
    """A token that came, and what might have come instead."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat answer, token by token."""

    content: list[ChatTokenLogprob]


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion, as four lists of equal length."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptTokenLogprob(msgspec.Struct):
    """One entry of ``prompt_logprobs``."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]


class FunctionCall(msgspec.Struct):
    """Which function, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


class ToolCallAnswer(msgspec.Struct):
    """A call that the model asks for; ``index`` is told in streams alone."""

    id: str
    function: FunctionCall
    index: int | UnsetType = UNSET
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    """An answer; ``content`` is None where it consists of tool calls, or of thoughts (``reasoning``) alone."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET
    reasoning: str | UnsetType | None = UNSET


class ChatChoice(msgspec.Struct):
    """One of ``n`` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """The answer to ``POST /v1/chat/completions``."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    """What is new in an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """What is new in one of ``n`` answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    """One event of a chat stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(msgspec.Struct):
    """One of the answers, or what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """The answer to ``POST /v1/completions``, or one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct):
    """A name that the model goes by."""

    id: str
    created: int
    root: str
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "opsin"
    parent: None = None
    permission: list[str] = []


class ModelList(msgspec.Struct):
    """The answer to ``GET /v1/models``."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokens(msgspec.Struct):
    """The answer to ``POST /tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(msgspec.Struct):
    """The answer to ``POST /detokenize``."""

    prompt: str


class Load(msgspec.Struct):
    """The answer to ``GET /load``."""

    server_load: int


class Version(msgspec.Struct):
    """The answer to ``GET /version``."""

    version: str
