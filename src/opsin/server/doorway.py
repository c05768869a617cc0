"""What stands before the application: a proxy's path is taken off, and while the model loads, probes tell how far it is
and everybody else learns when to come again.
"""

from __future__ import annotations

from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from opsin.server.errors import LoadingError, describe
from opsin.server.gate import PROBES, name_of, send_error

_LOADING = "The model is being loaded."


class Doorway:
    """The application to be: a server listens with this from the first moment, so that nobody finds a closed port."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None

    def open(self, app: ASGIApp) -> None:
        """Hand every request from now on to the application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == "/live":
            await Response()(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] in PROBES:
            await PlainTextResponse(_LOADING, 503)(scope, receive, send)
        elif scope["type"] == "http":  # whatever its key: nothing is told that a stranger may not know
            name = name_of(scope)
            status, body, headers = describe(LoadingError(_LOADING), name)
            await send_error(send, status, body, {**headers, "X-Request-Id": name, "Connection": "close"})


class UnderPath:
    """Takes a path off in front of every request's own, for proxies that leave it on; those that take it off may.

    Args:
        prefix: ``/vlm``.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._prefix + "/"):
            scope = {**scope, "path": scope["path"][len(self._prefix) :]}
        elif scope["type"] == "http" and scope["path"] == self._prefix:  # the page's links are relative to the slash
            await RedirectResponse(self._prefix + "/")(scope, receive, send)
            return
        await self._app(scope, receive, send)
