"""What a body says about the form of its answer, in any of the spellings that clients use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from opsin.errors import RequestError
from opsin.params import StructuredOutputsParams
from opsin.server.requests import SamplingRequest

_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


def constraint_of(request: SamplingRequest) -> StructuredOutputsParams | None:
    """The one constraint of a request, or None.

    Raises:
        RequestError: it is malformed, or there is more than one; ``param`` is the body's field.
    """
    found = {name: getattr(request, name) for name in ("structured_outputs", *_GUIDED)}
    found = {name: value for name, value in found.items() if value is not None}
    form = _response_format(request.response_format)
    if form is not None:
        found["response_format"] = form
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(found)
        raise RequestError(f"The request has {names}; an answer can follow only one of them.", param=next(iter(found)))
    ((name, value),) = found.items()
    if name in _GUIDED:
        value = {_GUIDED[name]: value}
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be an object, got {type(value).__name__}.", param=name)
    try:
        return StructuredOutputsParams(**cast("dict[str, Any]", value))
    except TypeError as error:  # a name that it does not have
        raise RequestError(f"{name}: {error}.", param=name) from None
    except RequestError as error:
        raise RequestError(str(error).replace("structured_outputs", name, 1), param=name) from None


def field_of(request: SamplingRequest) -> str:
    """The field of a body that asks for a form."""
    names = [name for name in ("structured_outputs", *_GUIDED) if getattr(request, name) is not None]
    return names[0] if names else "response_format"


@contextmanager
def blame_form(field: str) -> Iterator[None]:
    """Give errors about an answer's form the name of the body's field that asked for it."""
    try:
        yield
    except RequestError as error:
        if error.param != "structured_outputs":
            raise
        message = str(error).replace(error.param, field, 1)
        raise RequestError(message, code=error.code, param=field) from error


def _response_format(value: Any) -> dict[str, Any] | None:
    """OpenAI's ``response_format`` in the terms of ``StructuredOutputsParams``."""
    if value is None:
        return None
    kind: Any = cast("Mapping[str, Any]", value).get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        outer: Any = value.get("json_schema")
        schema: Any = cast("Mapping[str, Any]", outer).get("schema") if isinstance(outer, Mapping) else None
        if isinstance(schema, Mapping):
            return {"json": dict(cast("Mapping[str, Any]", schema))}
        raise RequestError(
            'response_format of type "json_schema" needs its schema: {"type": "json_schema", "json_schema": {"name": '
            '"...", "schema": {...}}}.',
            param="response_format",
        )
    raise RequestError(
        f'response_format must be an object whose type is "text", "json_object" or "json_schema"; got {value!r:.200}.',
        param="response_format",
    )
