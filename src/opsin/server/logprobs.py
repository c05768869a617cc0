"""Log-probabilities in the three shapes that the API has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opsin.outputs import Logprob, PromptLogprobs, SampleLogprobs
from opsin.server import answers
from opsin.server.answers import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptTokenLogprob,
    TokenAlternative,
)


def chat_logprobs(token_ids: list[int], logprobs: SampleLogprobs, top: int, *, by_id: bool = False) -> ChatLogprobs:
    """Per token, with its ``top`` likeliest alternatives.

    Args:
        by_id: name tokens by their ids; their bytes stay those of the text.
    """
    content: list[ChatTokenLogprob] = []
    for token, position in zip(token_ids, logprobs, strict=True):
        told = {i: (_named(i, entry, by_id), *_measured(entry)) for i, entry in position.items()}
        best = [TokenAlternative(*told[i]) for i in _best(position, top)]
        content.append(ChatTokenLogprob(*told[token], best))
    return ChatLogprobs(content)


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob] | None],
    top: int,
    offset: int,
    unnamed: str = "",
    *,
    by_id: bool = False,
) -> tuple[CompletionLogprobs, int]:
    """As four lists, and the characters of the answer up to the end of these tokens.

    Args:
        logprobs: per token; None for a prompt's first one.
        offset: characters of the answer before the first of these tokens.
        unnamed: the text of the token that has none.
        by_id: name tokens by their ids.
    """
    told = CompletionLogprobs([], [], [], [])
    for token, position in zip(token_ids, logprobs, strict=True):
        if position is None:
            told.text_offset.append(offset)
            told.tokens.append(f"token_id:{token}" if by_id else unnamed)
            told.token_logprobs.append(None)
            told.top_logprobs.append(None)
            offset += len(unnamed)
            continue
        text = position[token].decoded_token or ""
        best = _best(position, top)
        told.text_offset.append(offset)
        told.tokens.append(_named(token, position[token], by_id))
        told.token_logprobs.append(_finite(position[token].logprob))
        told.top_logprobs.append(
            {_named(i, position[i], by_id): _finite(position[i].logprob) for i in best} if top else None
        )
        offset += len(text)
    return told, offset


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


def _best(position: Mapping[int, Logprob], top: int) -> list[int]:
    return sorted(position, key=lambda token: position[token].rank or 0)[:top]


def _named(token: int, entry: Logprob, by_id: bool) -> str:
    return f"token_id:{token}" if by_id else entry.decoded_token or ""


def _measured(entry: Logprob) -> tuple[float, list[int]]:
    return _finite(entry.logprob), list((entry.decoded_token or "").encode("utf-8", "replace"))


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI says -9999 for what cannot happen."""
    return max(logprob, -9999.0)
