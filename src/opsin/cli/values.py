"""What the words behind flags mean: numbers, lists, mappings."""

from __future__ import annotations

import argparse
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Union

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def without_none(kind: Any) -> Any:
    """The type of a setting that may be None, otherwise."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        (kind,) = [part for part in typing.get_args(kind) if part is not type(None)]
    return kind


def converter(kind: Any) -> tuple[Callable[[str], Any], str]:
    """The function that reads a value of this type, and the name that stands for the value in ``--help``."""
    origin = typing.get_origin(kind) or kind
    if origin is int:
        return _integer, "N"
    if origin is float:
        return _number, "X"
    if origin is Mapping:
        return mapping, "JSON"
    if origin is tuple:
        return names, "A,B"
    if origin in (str, Literal):
        return str, "TEXT"
    raise TypeError(f"no command-line spelling for {kind}")


def _integer(text: str) -> int:
    """An integer, with k, m, g for powers of 1000 and K, M, G for powers of 1024."""
    factor = _UNITS.get(text[-1:], 1)
    try:
        return round(float(text[:-1]) * factor) if factor != 1 else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number (8192, 8k and 8K are)") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


class _Entry(NamedTuple):
    """One value of a mapping, behind one key or several, each within the last; "key+" is a list that grows by it."""

    keys: list[str]
    value: Any

    def into(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """The mapping with this value."""
        key, *deeper = self.keys
        result = dict(mapping)
        if deeper:
            inner = result.get(key)
            result[key] = _Entry(deeper, self.value).into(inner if isinstance(inner, Mapping) else {})
        elif key.endswith("+"):
            before = result.get(key[:-1])
            result[key[:-1]] = [*(before if isinstance(before, list) else []), self.value]
        else:
            result[key] = self.value
        return result


class StoreMapping(argparse.Action):
    """Stores what ``mapping`` reads; an ``_Entry`` goes into the one that was stored before."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        before = getattr(namespace, self.dest, {})
        setattr(namespace, self.dest, values.into(before) if isinstance(values, _Entry) else values)


def mapping(text: str) -> dict[str, Any] | _Entry:
    """A JSON object, ``name=value,name=value``, or ``.key.key=value``."""
    if text.startswith("."):
        path, _, value = text[1:].partition("=")
        return _Entry(path.split("."), _scalar(value))
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"'{text}' is not JSON: {error}") from None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and separator and value for name, separator, value in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a JSON object nor 'name=value,name=value'")
    return {name.strip(): _scalar(value.strip()) for name, _, value in pairs}


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def names(text: str) -> tuple[str, ...]:
    """A comma-separated list, or a JSON one."""
    if text.lstrip().startswith("["):
        try:
            return tuple(str(part) for part in json.loads(text))
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"this is no JSON list: {error}") from None  # unquoted: keys, perhaps
    return tuple(part.strip() for part in text.split(",") if part.strip())


def texts(text: str) -> tuple[str, ...]:
    """One text, or a JSON list of them."""
    return names(text) if text.lstrip().startswith("[") else (text,)
