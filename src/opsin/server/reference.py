"""``GET /docs``: the routes and their fields as one page of HTML, made from the OpenAPI document. Loads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from inspect import cleandoc
from typing import Any

Schema = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
details { border-top: 1px solid #8884; padding: .4rem 0; }
summary { cursor: pointer; }
summary b { display: inline-block; width: 3.5rem; }
code, td:first-child { font-family: ui-monospace, monospace; }
table { border-collapse: collapse; margin: .5rem 0 .5rem 1rem; }
td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
td:nth-child(2) { opacity: .7; }
"""
_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def reference_page(document: Schema) -> tuple[str, Mapping[str, str]]:
    """The page, and the headers that it goes out with.

    Args:
        document: OpenAPI's description of the server.
    """
    schemas: Schema = document.get("components", {}).get("schemas", {})
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><h1>{title}</h1>',
        '<p>Errors are <code>{"error": {"message", "type", "param", "code"}}</code>. Keys go into the header '
        "<code>Authorization: Bearer KEY</code>. The same for programs: "
        '<a href="openapi.json">openapi.json</a>.</p>',
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _operation(path, method, operation, schemas)
    return "\n".join(parts), _HEADERS


def _operation(path: str, method: str, operation: Schema, schemas: Schema) -> Iterator[str]:
    about = escape(" ".join(str(operation.get("description", "")).split()))
    yield f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> {about}</summary>"
    for content in operation.get("requestBody", {}).get("content", {}).values():
        name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        yield from _fields(schemas.get(name, {}))
    yield "</details>"


def _fields(schema: Schema) -> Iterator[str]:
    told = dict(_ATTRIBUTE.findall(cleandoc(schema.get("description", ""))))  # Python 3.13 does so itself
    required = schema.get("required", ())
    yield "<table>"
    for name, field in schema.get("properties", {}).items():
        kind = _kind(field) + (", required" if name in required else "")
        yield f"<tr><td>{escape(name)}<td>{escape(kind)}<td>{escape(' '.join(told.get(name, '').split()))}"
    yield "</table>"


def _kind(field: Schema) -> str:
    """A field's type in words; that it may be null goes without saying."""
    if "anyOf" in field:
        kinds = [_kind(choice) for choice in field["anyOf"] if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return " | ".join(map(repr, field["enum"]))
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}" if isinstance(field.get("items"), Mapping) else "list"
    return str(field.get("type", "anything"))
