"""Media that clients named once and need not send again: a ``uuid`` beside a picture, and later the ``uuid`` alone.

What is kept is the part itself, as it was sent (a URL, a data URL), by client, cache salt and name; so nobody reads or
replaces another's. The engine's caches never see the names: they go by the bytes, which a name cannot forge.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from opsin.errors import RequestError

_MAX_BYTES = 256 * 2**20
_MAX_NAME_CHARS = 256
_ENTRY_BYTES = 1024  # that a part costs beside its content and its salt


_KINDS = ("image_url", "video_url")


class _Name(NamedTuple):
    client: str
    salt: str
    kind: str
    uuid: str


class RememberedMedia:
    """The parts that were named last, up to a number of bytes. Not for several threads."""

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._parts: OrderedDict[_Name, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._parts)

    def resolve(self, messages: Sequence[Any], client: str, salt: str) -> list[Any]:
        """Messages without uuids: those that come with content are remembered, the others replaced by theirs.

        Raises:
            RequestError: a name that is not known (any more).
        """
        return [self._resolve(message, f"messages.{i}", client, salt) for i, message in enumerate(messages)]

    def _resolve(self, message: Any, path: str, client: str, salt: str) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            return message
        parts: list[Any] = []
        for j, part in enumerate(cast("list[Any]", content)):
            uuid = cast("Mapping[str, Any]", part).get("uuid") if isinstance(part, Mapping) else None
            if not isinstance(uuid, str):
                parts.append(part)
                continue
            if len(uuid) > _MAX_NAME_CHARS:
                raise RequestError(
                    f"A uuid may have {_MAX_NAME_CHARS} characters; this one has {len(uuid):,}.",
                    param=f"{path}.content.{j}.uuid",
                )
            rest = {key: value for key, value in cast("Mapping[str, Any]", part).items() if key != "uuid"}
            kind = next((key for key in _KINDS if key in (rest.get("type"), *rest)), "")
            parts.append(self._part(rest, _Name(client, salt, kind, uuid), f"{path}.content.{j}"))
        return {**cast("Mapping[str, Any]", message), "content": parts}

    def _part(self, part: dict[str, Any], name: _Name, path: str) -> dict[str, Any]:
        url = _url_of(part, name.kind)
        if url is not None:
            self._keep(name, url)
            return part
        if any(part.get(key) for key in part if key != "type"):  # content of a kind that is not remembered
            return part
        url = self._parts.get(name)
        if url is None:
            raise RequestError(
                f"No {name.kind or 'part'} is known here by uuid {name.uuid!r:.100}, or not any more. Send it along "
                "with its uuid.",
                code="unknown_media_uuid",
                param=path,
            )
        self._parts.move_to_end(name)
        return {"type": name.kind, name.kind: {"url": url}}

    def _keep(self, name: _Name, url: str) -> None:
        known = self._parts.pop(name, None)
        self._num_bytes += _cost(name, url) - (0 if known is None else _cost(name, known))
        self._parts[name] = url
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= _cost(*self._parts.popitem(last=False))


def _cost(name: _Name, url: str) -> int:
    return len(url) + len(name.salt) + _ENTRY_BYTES


def _url_of(part: Mapping[str, Any], kind: str) -> str | None:
    value: Any = part.get(kind) if kind.endswith("_url") else None
    if isinstance(value, Mapping):
        value = cast("Mapping[str, Any]", value).get("url")
    return value if isinstance(value, str) and value else None
