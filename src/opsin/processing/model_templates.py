"""Which chat template a conversation is rendered with; compiled ones are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from opsin.errors import RequestError
from opsin.processing.isolated import IsolatedTemplate
from opsin.processing.jinja import ChatTemplate, ContentFormat

_MAX_KEPT = 16  # callers may bring their own


class Template(Protocol):
    """A compiled template, here or in processes of its own."""

    @property
    def content_format(self) -> ContentFormat: ...

    @property
    def render(self) -> Any:
        """As ``ChatTemplate.render``."""
        ...


class ModelTemplates:
    """The templates of one model, and those that callers bring.

    Args:
        plain: the model's template; None where it has none.
        with_tools: the one that shows tools; often the same.
    """

    def __init__(self, plain: str | None, with_tools: str | None, special_tokens: Mapping[str, Any]) -> None:
        self._sources = {False: plain, True: with_tools}
        self._special_tokens = special_tokens
        self._kept: dict[tuple[str, bool], Template] = {}

    def source(self, *, tools: bool) -> str | None:
        """The text of the model's own."""
        return self._sources[tools]

    def is_kept(self, *, tools: bool) -> bool:
        """Whether the model's own was compiled already."""
        return (self._sources[tools], False) in self._kept

    def choose(self, given: str | None, *, tools: bool, isolate: bool) -> Template:
        """A caller's template (jinja text), or the model's own.

        Args:
            isolate: a caller's template is run in a process of its own.

        Raises:
            RequestError: there is none, or it is not valid.
        """
        source = given or self._sources[tools]
        if source is None:
            raise RequestError(
                "This model has no chat template. Give one (chat_template, or --chat-template when serving), "
                "or write the prompt out and use generate or /v1/completions.",
                param="messages",
            )
        key: tuple[str, Literal[True, False]] = (source, bool(given) and isolate)
        template = self._kept.get(key)
        if template is None:
            template = (IsolatedTemplate if key[1] else ChatTemplate)(source, self._special_tokens)
            while len(self._kept) >= _MAX_KEPT:
                self._kept.pop(next(iter(self._kept)), None)  # another thread may have been quicker
            self._kept[key] = template
        return template
