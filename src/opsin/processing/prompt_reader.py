"""What callers give, read for one model: prompts in text or ids, conversations, and the media that they show."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from opsin.config import MediaConfig
from opsin.errors import RequestError
from opsin.media.clips import FrameChoice, Probe
from opsin.media.fetch import decode_frames_url
from opsin.models.rule import MediaRule
from opsin.processing.chat import ChatPrompt, MediaReference, render_chat
from opsin.processing.jinja import ContentFormat
from opsin.processing.model_templates import ModelTemplates
from opsin.processing.neutral import ControlStrings
from opsin.processing.prompts import Opener, Prompt, read_prompt
from opsin.processing.texts import TextLimits
from opsin.types import Modality


class PromptReader:
    """Reads prompts and conversations, and opens what they show. Sizes only; nothing is decoded.

    Args:
        templates: the model's, for conversations.
        controls: what texts of callers must not be taken for.
        feature_width: values per row that features given by callers must have.
        probe: reads videos' headers.
    """

    def __init__(
        self,
        rule: MediaRule,
        templates: ModelTemplates,
        controls: ControlStrings,
        texts: TextLimits,
        media: MediaConfig,
        *,
        feature_width: int,
        probe: Probe,
    ) -> None:
        self.templates = templates
        self._rule = rule
        self._controls = controls
        self._texts = texts
        self._media = media
        self._feature_width = feature_width
        self._probe = probe
        FrameChoice.of(media.media_io_kwargs)  # a mistake in there should be told at once

    @property
    def is_ready(self) -> bool:
        """The model's own template is compiled: tens of milliseconds that the first conversation takes."""
        return self.templates.is_kept(tools=False)

    def read(self, prompt: Any) -> Prompt:
        """Read a ``PromptType`` and open its media.

        Raises:
            RequestError, MediaError: see ``opsin.processing.prompts.read_prompt``; or it shows too many items.
        """
        read = read_prompt(prompt, self.opener())
        self._check_limits([item.modality for item in read.media], "multi_modal_data")
        return read

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto"] | ContentFormat = "auto",
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: bool | None = None,
        isolate_template: bool = False,
    ) -> ChatPrompt:
        """Render one conversation with the model's template, or with ``chat_template`` (jinja text).

        Raises:
            RequestError: no template, a malformed message, too many items, or what the template refuses.
        """
        self._texts.check_messages(messages)
        try:
            chat = render_chat(
                messages,
                self.templates.choose(chat_template, tools=bool(tools), isolate=isolate_template),
                self._controls,
                self._sign,
                content_format=chat_template_content_format,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )
        except RecursionError:
            raise RequestError(
                "The conversation, or what goes with it, is nested too deeply.", param="messages"
            ) from None
        FrameChoice.of(media_io_kwargs)  # before anything is fetched
        self._check_limits([reference.modality for reference in chat.media], "messages")
        media = [self._with_frames(reference) for reference in chat.media]
        return dataclasses.replace(
            chat, media=media, media_io_kwargs=media_io_kwargs, add_special_tokens=add_special_tokens
        )

    def opener(self, media_io_kwargs: Mapping[str, Any] | None = None) -> Opener:
        """How media are opened where a call asks for ``media_io_kwargs``, over the engine's own."""
        choice = FrameChoice.of(self._media.media_io_kwargs, media_io_kwargs)
        return Opener(self._media, self._feature_width, self._probe, choice)

    def _with_frames(self, reference: MediaReference) -> MediaReference:
        """The frames themselves in place of a URL that holds them."""
        if reference.modality != "video" or not isinstance(reference.value, str):
            return reference
        try:
            frames = decode_frames_url(reference.value, self._media)
        except RequestError as error:
            error.param = error.param or reference.param
            raise
        return reference if frames is None else dataclasses.replace(reference, value=frames)

    def _check_limits(self, modalities: Sequence[Modality], param: str) -> None:
        for modality, count in Counter(modalities).items():
            limits = (self._rule.max_items(modality), self._media.limit_mm_per_prompt.get(modality))
            limit = min((n for n in limits if n is not None), default=None)
            if limit is None or count <= limit:
                continue
            advice = "This model takes none."
            if limits[0] is None or limits[0] >= count:
                advice = (
                    f"This prompt has {count}: send fewer, or start with limit_mm_per_prompt={{'{modality}': {count}}}."
                )
            elif limits[0] > 0:
                advice = f"This prompt has {count}, more than the model was made for: send fewer."
            raise RequestError(f"At most {limit} {modality}(s) may be provided in one prompt. {advice}", param=param)

    def _sign(self, modality: Modality, number: int) -> str:
        if self._rule.max_items(modality) == 0:
            raise RequestError(f"This model takes no {modality}.", param="messages")
        return self._rule.placeholder(modality).text.replace("{index}", str(number))
