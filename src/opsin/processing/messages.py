"""Messages made of what callers of ``pick``, ``embed`` and ``score`` hold in their hands."""

# Items come from callers, so they are Any until they were looked at.
# pyright: standard

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsin.errors import RequestError

_URLS = ("http://", "https://", "data:", "file:")


def question(images: Any, text: Any) -> list[dict[str, Any]]:
    """A conversation of one user turn: pictures, then text.

    Args:
        images: one, several in a list or tuple, or None: URLs, paths, bytes, ``PIL`` pictures, uint8 arrays.

    Raises:
        RequestError: the text is none.
    """
    return _ask(_parts(images), text)


def question_about(urls: Sequence[str], text: Any) -> list[dict[str, Any]]:
    """``question`` for callers from afar, who may name URLs and nothing else."""
    return _ask([_by_url(url) for url in urls], text)


def as_choices(given: Any) -> list[Any]:
    """A list of choices, which a bare string is not.

    Raises:
        RequestError: it is no list.
    """
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise RequestError(f"choices must be a list of texts, got {type(given).__name__}.", param="choices")
    return list(given)


def as_conversation(item: Any) -> list[dict[str, Any]] | None:
    """The conversation that stands for an item whose vector is wanted; None for an item that is a prompt.

    ``{"content": text or parts}`` is a user's message, as in vLLM; a picture is a message of its own.
    """
    if isinstance(item, Mapping):
        return [{"role": "user", "content": item["content"]}] if "content" in item else None
    if item is None or isinstance(item, str) or (isinstance(item, Sequence) and not isinstance(item, bytes)):
        return None
    return [{"role": "user", "content": _parts(item)}]


def _ask(pictures: Sequence[dict[str, Any]], text: Any) -> list[dict[str, Any]]:
    if not isinstance(text, str) or not text:
        raise RequestError(f"question must be a non-empty text, got {type(text).__name__}.", param="question")
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def _by_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _parts(images: Any) -> list[dict[str, Any]]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [part for image in images for part in _parts(image)]
    if isinstance(images, str):
        if images.startswith(_URLS):
            return [_by_url(images)]
        images = Path(images)
    return [{"type": "image_pil", "image_pil": images}]
