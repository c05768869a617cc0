"""What a text must be before it is worth tokenising: valid Unicode, and not too long to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from opsin.errors import ContextLengthError, RequestError

_SPARE_CHARS = 2**19  # beyond those that the context could hold: white space, or what is to be cut off


class TextLimits:
    """How much text a model's prompts may have.

    Args:
        max_model_len: tokens that the context holds.
        longest_piece: characters of the longest one.
    """

    def __init__(self, max_model_len: int, longest_piece: int) -> None:
        self._max_model_len = max_model_len
        self._longest_piece = longest_piece
        self._most = max_model_len * longest_piece

    def check_size(self, num_chars: int, param: str) -> None:
        """Refuse text that costs too much to look at, whatever is in it, and however little of it is to be kept.

        Raises:
            ContextLengthError: ``param`` is the field.
        """
        if num_chars > self._most + _SPARE_CHARS:
            raise ContextLengthError(
                f"The text has {num_chars:,} characters; at most {self._most + _SPARE_CHARS:,} are looked at, and this "
                f"model's context holds {self._max_model_len} tokens. Shorten it.",
                param=param,
            )

    def check_prompt(self, text: str, is_cut: bool) -> None:
        """Refuse text that cannot fit the context, and what is no text.

        White space is hardly counted, since some tokenizers fold runs of it.

        Args:
            is_cut: what does not fit is left out.

        Raises:
            RequestError: ``param`` is "prompt".
        """
        self.check_size(len(text), "prompt")
        if not is_cut and len(text) > self._most:
            length = sum(map(len, text.split()))
            if length > self._most:
                raise ContextLengthError(
                    f"The prompt's text has {length:,} characters besides white space; this model's context holds "
                    f"{self._max_model_len} tokens of at most {self._longest_piece} characters. Shorten it.",
                    param="prompt",
                )
        check_unicode(text)

    def check_messages(self, messages: object) -> None:
        """Refuse conversations whose texts are too long to be rendered; what is no conversation passes.

        Raises:
            ContextLengthError: ``param`` is "messages".
        """
        if isinstance(messages, Sequence) and not isinstance(messages, str):
            self.check_size(sum(map(_num_chars, cast("Sequence[Any]", messages))), "messages")


def check_unicode(text: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and tokenizers cannot read.

    Raises:
        RequestError: ``param`` is "prompt".
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise RequestError(
            f"The prompt holds {half} at character {error.start}: half of a surrogate pair, which is no character. "
            "Send valid Unicode.",
            param="prompt",
        ) from None


def _num_chars(message: Any) -> int:
    content = cast("Mapping[str, Any]", message).get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return len(content) if isinstance(content, str) else 0
    return sum(map(_num_part_chars, cast("list[Any]", content)))


def _num_part_chars(part: Any) -> int:
    text = cast("Mapping[str, Any]", part).get("text") if isinstance(part, Mapping) else part
    return len(text) if isinstance(text, str) else 0
