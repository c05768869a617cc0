"""OpenAI-style messages to one prompt and the pictures it refers to, in order.

Pictures are not opened here: a URL stays a URL. Whoever calls fetches what needs fetching, under its own policy, and
hands the prompt and the opened pictures to ``opsin.processing.processor``.
"""

# What is read here comes from callers, so it is Any until it was looked at.
# pyright: standard

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict, cast

from opsin.errors import RequestError
from opsin.processing.jinja import ContentFormat
from opsin.processing.model_templates import Template
from opsin.processing.neutral import ControlStrings, Rendered
from opsin.types import Modality

# A role may become part of a control token ('<|' + role + '|>'), so only these pass.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
_MEDIA_TYPES: dict[str, Modality] = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "image_pil": "image",
    "image_embeds": "image",
    "video_url": "video",
    "input_video": "video",
    "video": "video",
}


@dataclass(frozen=True, slots=True)
class MediaReference:
    """A picture or video that a message names.

    Attributes:
        value: a URL (any ``str``), a picture object, encoded bytes, an embedding; None where only ``uuid`` is given.
        is_embedding: ``value`` holds features, not a picture.
        param: where it stood in the request, for error messages.
        options: settings of the picture processor for this item, over the request's.
    """

    modality: Modality
    value: Any
    param: str
    uuid: str | None = None
    is_embedding: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class ChatOptions(TypedDict, total=False):
    """How a conversation becomes a prompt; names and defaults are vLLM's.

    Keys:
        chat_template: jinja text instead of the model's own template.
        chat_template_content_format: whether the template takes content as text or as parts; "auto" asks it.
        continue_final_message: go on with the last message instead of answering it.
        chat_template_kwargs: more variables for the template; they cannot replace its own.
        media_io_kwargs: which frames of the videos to take, over the engine's own setting of the name.
        add_special_tokens: put the tokenizer's own before the prompt; None does unless the template has.
        isolate_template: run ``chat_template`` in a process that may be killed, since it comes from afar.
    """

    chat_template: str | None
    chat_template_content_format: Literal["auto"] | ContentFormat
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    media_io_kwargs: Mapping[str, Any] | None
    add_special_tokens: bool | None
    isolate_template: bool


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation: the prompt, which of its control strings are a user's own words, its media, which frames
    to take of videos among them, and whether special tokens come before it."""

    prompt: Rendered
    media: list[MediaReference] = field(default_factory=list)
    media_io_kwargs: Mapping[str, Any] | None = None
    add_special_tokens: bool | None = None


class _Text(NamedTuple):
    text: str


class _Collected:
    """Media in the order of the prompt, numbered per modality from 1."""

    def __init__(self) -> None:
        self.items: list[MediaReference] = []
        self._counts: Counter[Modality] = Counter()

    def add(self, item: MediaReference) -> int:
        self.items.append(item)
        self._counts[item.modality] += 1
        return self._counts[item.modality]


_Part = _Text | MediaReference


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    template: Template,
    controls: ControlStrings,
    placeholder: Callable[[Modality, int], str],
    *,
    content_format: Literal["auto"] | ContentFormat = "auto",
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """Render a conversation.

    Templates that take content as text ("string") get the picture placeholders in front of the message's text, joined
    by newlines; where a picture stands between two texts, every placeholder of that message keeps its place. Templates
    that loop over parts ("openai") write the placeholders themselves.

    Args:
        controls: what a user's text must not be taken for.
        placeholder: the text that marks the n-th (from 1) item of a modality.
        content_format: "auto" asks the template.

    Raises:
        RequestError: ``param`` is the path of the offending part, such as ``messages.0.content.1``.
    """
    form = template.content_format if content_format == "auto" else content_format
    if form not in ("string", "openai"):
        raise RequestError(
            f"chat_template_content_format is {content_format!r}; it must be 'auto', 'string' or 'openai'.",
            param="chat_template_content_format",
        )
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(
            f"messages must be a non-empty list of {{'role', 'content'}} objects, got {_kind(messages)}.",
            param="messages",
        )
    media = _Collected()
    conversation: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        path = f"messages.{i}"
        parts = _message_parts(message, path)
        rest = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
        if "tool_calls" in rest:
            rest["tool_calls"] = _parse_tool_calls(rest["tool_calls"], f"{path}.tool_calls")
        if message["role"] == "assistant":
            rest |= _thoughts(rest, path)
        turn: dict[str, Any] = {"role": message["role"], **controls.mark_all(rest)}
        if parts is not None:
            to_content = _as_string if form == "string" else _as_parts
            turn["content"] = to_content(parts, media, controls, placeholder)
        conversation.append(turn)
    marked = template.render(
        conversation,
        tools=controls.mark_all(tools),
        documents=controls.mark_all(documents),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        kwargs=controls.mark_all(chat_template_kwargs),
    )
    return ChatPrompt(controls.unmark(marked), media.items)


# -------------------------------------------------------------------------------------------- reading messages


def _message_parts(message: Any, path: str) -> list[_Part] | None:
    """The parts of a message's content; None where it has none."""
    if not isinstance(message, Mapping):
        raise RequestError(f"A message must be an object with 'role' and 'content', got {_kind(message)}.", param=path)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"role is {role!r}; it must be one of {', '.join(ROLES)}.", param=f"{path}.role")
    content = message.get("content")
    if content is None:
        if role == "assistant":  # a turn that only calls tools
            return None
        raise RequestError(f"A {role} message must have content: text or a list of parts.", param=f"{path}.content")
    if isinstance(content, str):
        return [_Text(content)]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(f"content must be text or a list of parts, got {_kind(content)}.", param=f"{path}.content")
    return [_part(part, f"{path}.content.{j}") for j, part in enumerate(content)]


def _part(part: Any, path: str) -> _Part:
    if isinstance(part, str):
        return _Text(part)
    if not isinstance(part, Mapping):
        raise RequestError(f"A content part must be text or an object with a 'type', got {_kind(part)}.", param=path)
    kind = part.get("type")
    typeless = kind is None
    if typeless:
        kind = next((name for name in (*_MEDIA_TYPES, "text") if name in part), None)
    if kind in _TEXT_TYPES:
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise RequestError(f"A part of type {kind!r} must have 'text', a string; got {_kind(text)}.", param=path)
        return _Text(text)
    modality = _MEDIA_TYPES.get(kind) if isinstance(kind, str) else None
    if modality is None:
        raise RequestError(
            f"Content part type {kind!r} is unknown; use one of {', '.join((*_TEXT_TYPES, *_MEDIA_TYPES))}.",
            param=path,
        )
    assert isinstance(kind, str)
    uuid = part.get("uuid")
    if uuid is not None and not (isinstance(uuid, str) and uuid):
        raise RequestError(f"uuid must be a non-empty string, got {_kind(uuid)}.", param=f"{path}.uuid")
    value = _media_value(part, kind, typeless, path)
    if value is None and uuid is None:
        raise RequestError(f"A part of type {kind!r} must have a value under {kind!r}.", param=path)
    options = part.get("mm_processor_kwargs") or {}
    if not isinstance(options, Mapping):
        raise RequestError(
            f"mm_processor_kwargs of a part must be an object, got {_kind(options)}.",
            param=f"{path}.mm_processor_kwargs",
        )
    is_embedding = kind == "image_embeds"
    return MediaReference(modality, value, f"{path}.{kind}", uuid, is_embedding, cast("Mapping[str, Any]", options))


def _media_value(part: Mapping[str, Any], kind: str, typeless: bool, path: str) -> Any:
    """What the part points at: a URL for the types that name one, the object itself for the others."""
    if kind in ("image", "video"):  # Hugging Face's form: {"type": "image", "image" or "url": ...}
        value = part.get(kind)
        return part.get("url") if value is None else value
    if kind in ("image_pil", "image_embeds"):
        return part.get(kind)
    key = kind if kind.endswith("_url") else kind.removeprefix("input_") + "_url"
    value = part.get(key)
    if isinstance(value, str) and kind.endswith("_url") and not typeless:
        raise RequestError(
            f'{kind} must be an object: {{"type": "{kind}", "{kind}": {{"url": "..."}}}}; got a bare string.',
            param=path,
        )
    if isinstance(value, Mapping):
        if not value:
            return None
        value = value.get("url")
    if value is not None and not (isinstance(value, str) and value):
        raise RequestError(
            f"The url of a part of type {kind!r} must be a non-empty string, got {_kind(value)}.", param=path
        )
    return value


def _thoughts(message: Mapping[str, Any], path: str) -> dict[str, str]:
    """What the assistant thought before it answered, under both of the names that templates and clients have for it."""
    names = ("reasoning", "reasoning_content")
    for name in names:
        thought = message.get(name)
        if thought is None:
            continue
        if not isinstance(thought, str):
            raise RequestError(f"{name} must be text, got {_kind(thought)}.", param=f"{path}.{name}")
        return dict.fromkeys(names, thought)
    return {}


def _parse_tool_calls(calls: Any, path: str) -> list[Any]:
    """Tool calls with their arguments as objects, as templates expect them; OpenAI sends them as JSON text."""
    if not isinstance(calls, Sequence) or isinstance(calls, str) or not all(isinstance(c, Mapping) for c in calls):
        raise RequestError(f"tool_calls must be a list of objects, got {_kind(calls)}.", param=path)
    parsed = []
    for i, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError) as error:
                raise RequestError(f"arguments are not JSON: {error}", param=f"{path}.{i}.function.arguments") from None
            call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(call)
    return parsed


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    empty = isinstance(value, str | list | tuple | dict) and not value
    return ("an empty " if empty else "") + type(value).__name__


# ----------------------------------------------------------------------------------- content for the template


def _as_parts(
    parts: Sequence[_Part],
    media: _Collected,
    controls: ControlStrings,
    placeholder: Callable[[Modality, int], str],
) -> list[dict[str, str]]:
    content: list[dict[str, str]] = []
    for part in parts:
        if isinstance(part, MediaReference):
            media.add(part)
            content.append({"type": part.modality})
        else:
            content.append({"type": "text", "text": controls.mark(part.text)})
    return content


def _as_string(
    parts: Sequence[_Part],
    media: _Collected,
    controls: ControlStrings,
    placeholder: Callable[[Modality, int], str],
) -> str:
    texts: list[str] = []
    signs: list[str] = []
    in_place: list[str] = []
    for part in parts:
        if isinstance(part, MediaReference):
            signs.append(placeholder(part.modality, media.add(part)))
            in_place.append(signs[-1])
        else:
            texts.append(controls.mark(part.text))
            in_place.append(texts[-1])
    return "\n".join(in_place if _is_interleaved(parts) else signs + texts)


def _is_interleaved(parts: Sequence[_Part]) -> bool:
    """Whether some picture stands between two texts."""
    shape = "".join("m" if isinstance(part, MediaReference) else "t" for part in parts)
    return "m" in shape.strip("m").strip("t")
