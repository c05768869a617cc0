"""Log-probabilities in the three shapes that the API has for them."""

from __future__ import annotations

from opsin.outputs import PromptLogprobs, SampleLogprobs
from opsin.server import answers
from opsin.server.answers import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptTokenLogprob,
    TokenAlternative,
)


def chat_logprobs(token_ids: list[int], logprobs: SampleLogprobs, top: int) -> ChatLogprobs:
    """Per token, with its ``top`` likeliest alternatives."""
    content: list[ChatTokenLogprob] = []
    for token, position in zip(token_ids, logprobs, strict=True):
        named = {i: (entry.decoded_token or "", entry.logprob) for i, entry in position.items()}
        best = sorted(position, key=lambda i: position[i].rank or 0)[:top]
        content.append(
            ChatTokenLogprob(*_alternative(*named[token]), [TokenAlternative(*_alternative(*named[i])) for i in best])
        )
    return ChatLogprobs(content)


def completion_logprobs(token_ids: list[int], logprobs: SampleLogprobs, top: int, offset: int) -> CompletionLogprobs:
    """As four lists.

    Args:
        offset: characters of the answer before the first of these tokens.
    """
    told = CompletionLogprobs([], [], [], [])
    for token, position in zip(token_ids, logprobs, strict=True):
        text = position[token].decoded_token or ""
        best = sorted(position, key=lambda i: position[i].rank or 0)[:top]
        told.text_offset.append(offset)
        told.tokens.append(text)
        told.token_logprobs.append(_finite(position[token].logprob))
        told.top_logprobs.append(
            {position[i].decoded_token or "": _finite(position[i].logprob) for i in best} if top else None
        )
        offset += len(text)
    return told


def prompt_logprobs(logprobs: PromptLogprobs) -> answers.PromptLogprobs:
    """Keyed by token id, as text: JSON has no other keys."""
    return [
        None
        if position is None
        else {
            str(token): PromptTokenLogprob(_finite(entry.logprob), entry.rank, entry.decoded_token)
            for token, entry in position.items()
        }
        for position in logprobs
    ]


def _alternative(text: str, logprob: float) -> tuple[str, float, list[int]]:
    return text, _finite(logprob), list(text.encode("utf-8", "replace"))


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI says -9999 for what cannot happen."""
    return max(logprob, -9999.0)
