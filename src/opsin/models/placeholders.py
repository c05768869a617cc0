"""What stands for pictures in prompts: texts, and ids that config.json, processor and tokenizer agree on. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opsin.errors import UnsupportedModelError
from opsin.models.rule import Placeholder, TokenIds


def read_image_token(
    config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds
) -> tuple[Placeholder, int]:
    """A picture's mark and its token, as the processor config and config.json name them, ``<image>`` by default.

    Raises:
        UnsupportedModelError: nobody knows its id.
    """
    text = processor.get("image_token") or "<image>"
    if not isinstance(text, str):
        text = text["content"]  # a tokenizers.AddedToken, as JSON
    tokenizer_id = tokenizer.convert_tokens_to_ids(text)
    token_id = config.get("image_token_index", config.get("image_token_id", tokenizer_id))
    if token_id is None:
        raise UnsupportedModelError(f"config.json has no image_token_index, and the tokenizer does not know {text!r}.")
    return plain_mark(text, token_id if tokenizer_id == token_id else None), token_id


def plain_mark(text: str, token_id: int | None) -> Placeholder:
    """``text`` as it stands, replaced as a whole."""
    return Placeholder(text, token_id, re.escape(text))


def token_ids(tokenizer: TokenIds, *tokens: str) -> tuple[int, ...]:
    """Ids of tokens that the family writes into prompts.

    Raises:
        UnsupportedModelError: the tokenizer lacks one.
    """
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    absent = [token for token, i in zip(tokens, ids, strict=True) if i is None]
    if absent:
        raise UnsupportedModelError(f"The tokenizer lacks {', '.join(absent)}, which this model's prompts need.")
    return tuple(i for i in ids if i is not None)


def agreed_id(
    tokenizer: TokenIds, token: str, config: Mapping[str, Any], key: str, default: int | None = None
) -> int | None:
    """The id of a token that config.json names under ``key``; None where the tokenizer does not know the token.

    Args:
        default: what an absent key says; by default nothing.

    Raises:
        UnsupportedModelError: the two differ.
    """
    token_id = tokenizer.convert_tokens_to_ids(token)
    built = config.get(key, token_id if default is None else default)
    if token_id not in (None, built):
        raise UnsupportedModelError(
            f"The tokenizer's id of {token!r} is {token_id}; config.json's {key} is {built}. They must be the same."
        )
    return token_id
