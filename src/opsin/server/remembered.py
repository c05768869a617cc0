"""Media that clients named once and need not send again: a ``uuid`` beside a picture, and later the ``uuid`` alone.

What is kept is the part itself, as it was sent (a URL, a data URL), by client, cache salt and name; so nobody reads or
replaces another's, and nobody pushes another's out: where memory runs short, the oldest of whoever keeps the most goes.
The engine's caches never see the names: they go by the bytes, which a name cannot forge.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from opsin.errors import RequestError

_MAX_BYTES = 256 * 2**20
_MAX_NAME_CHARS = 256
_MAX_SALTS = 256  # of one client
_MIN_COST = 2**14  # of a part, however small: so that a large one takes the place of few

_KINDS = ("image_url", "video_url")


class _Name(NamedTuple):
    kind: str
    uuid: str


class _Part(NamedTuple):
    url: str
    cost: int


@dataclass(slots=True)
class _Names:
    """What one client named under one salt, the oldest first."""

    parts: OrderedDict[_Name, _Part] = field(default_factory=OrderedDict[_Name, _Part])
    num_bytes: int = 0


@dataclass(slots=True)
class _Client:
    """The salts of one client, those used last at the end."""

    salts: OrderedDict[str, _Names] = field(default_factory=OrderedDict[str, _Names])
    num_bytes: int = 0


class RememberedMedia:
    """The parts that were named last, up to a number of bytes for all. Not for several threads.

    N clients that keep a lot have an Nth of it each, and so have the salts of one client.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._clients: dict[str, _Client] = {}

    def __len__(self) -> int:
        return sum(len(names.parts) for client in self._clients.values() for names in client.salts.values())

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
            parts.append(self._part(rest, client, salt, _Name(kind, uuid), f"{path}.content.{j}"))
        return {**cast("Mapping[str, Any]", message), "content": parts}

    def _part(self, part: dict[str, Any], client: str, salt: str, name: _Name, path: str) -> dict[str, Any]:
        url = _url_of(part, name.kind)
        if url is not None:
            self._keep(client, salt, name, url)
            return part
        if any(part.get(key) for key in part if key != "type"):  # content of a kind that is not remembered
            return part
        known = self._clients.get(client)
        names = None if known is None else known.salts.get(salt)
        if known is None or names is None or name not in names.parts:
            raise RequestError(
                f"No {name.kind or 'part'} is known here by uuid {name.uuid!r:.100}, or not any more. Send it along "
                "with its uuid.",
                code="unknown_media_uuid",
                param=path,
            )
        known.salts.move_to_end(salt)
        names.parts.move_to_end(name)
        return {"type": name.kind, name.kind: {"url": names.parts[name].url}}

    def _keep(self, name_of_client: str, salt: str, name: _Name, url: str) -> None:
        client = self._clients.setdefault(name_of_client, _Client())
        names = client.salts.setdefault(salt, _Names())
        client.salts.move_to_end(salt)
        if name in names.parts:
            self._count(client, names, -names.parts.pop(name).cost)
        part = _Part(url, max(sys.getsizeof(url) + sys.getsizeof(salt), _MIN_COST))
        names.parts[name] = part
        self._count(client, names, part.cost)
        if len(client.salts) > _MAX_SALTS:
            _, oldest = client.salts.popitem(last=False)
            self._count(client, oldest, -oldest.num_bytes)
        while self._num_bytes > self._max_bytes:
            self._forget_one()

    def _forget_one(self) -> None:
        client = max(self._clients.values(), key=lambda client: client.num_bytes)
        salt, names = max(client.salts.items(), key=lambda item: item[1].num_bytes)
        _, part = names.parts.popitem(last=False)
        self._count(client, names, -part.cost)
        if not names.parts:
            del client.salts[salt]

    def _count(self, client: _Client, names: _Names, num_bytes: int) -> None:
        names.num_bytes += num_bytes
        client.num_bytes += num_bytes
        self._num_bytes += num_bytes


def _url_of(part: Mapping[str, Any], kind: str) -> str | None:
    value: Any = part.get(kind) if kind.endswith("_url") else None
    if isinstance(value, Mapping):
        value = cast("Mapping[str, Any]", value).get("url")
    return value if isinstance(value, str) and value else None
