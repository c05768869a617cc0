"""The page at ``/``: a chat with pictures. Its files are static and hold no secrets, so they need no key; what the page
asks the server for does.
"""

from __future__ import annotations

from importlib import resources

from starlette.responses import Response

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/tokens.js": ("tokens.js", "text/javascript; charset=utf-8"),
    "/page/markdown.js": ("markdown.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""By path: a file of this folder, and its media type."""

_HEADERS = {
    # It shows what models say: nothing but this server's own script may run, and nothing be loaded or sent elsewhere.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_file(path: str) -> Response:
    """One of ``FILES``."""
    name, media_type = FILES[path]
    return Response(resources.files(__name__).joinpath(name).read_bytes(), media_type=media_type, headers=_HEADERS)
