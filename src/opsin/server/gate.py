"""What every request passes first: a name, its key, and the guarantee that whatever goes wrong is answered in form."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import traceback
import uuid
from collections.abc import Iterable, Mapping

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin.errors import EngineDeadError, OpsinError
from opsin.server import page
from opsin.server.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    EncodedBodyError,
    ErrorBody,
    UnauthorizedError,
    describe,
)
from opsin.server.metrics import LoopClock, Metrics
from opsin.server.quota import Quotas
from opsin.server.transport import ClientGone

logger = logging.getLogger(__name__)

PROBES = frozenset({"/health", "/live", "/ping", "/ready"})
"""What orchestrators ask without a key."""

OPEN = PROBES | page.FILES.keys()
"""What needs no key: the probes, and the page's files, which are the same for everybody."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def request_id_from(text: str | None) -> str:
    """The name that a client chose, if it is fit for headers and logs; a new one otherwise."""
    return text if text is not None and _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


def name_of(scope: Scope) -> str:
    """A request's id: from its X-Request-Id header, or a new one."""
    return request_id_from(_header(scope, b"x-request-id").decode("latin-1") or None)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


class Keys:
    """The keys that let a client in. Only their digests are kept.

    Args:
        keys: none lets everybody in.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, authorization: bytes) -> str | None:
        """Compare an Authorization header with every key, in a time that tells nothing.

        Returns:
            A name for the client with this key; None where everybody is let in.

        Raises:
            UnauthorizedError: it holds none of them.
        """
        if not self._digests:
            return None
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise UnauthorizedError(
                "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return given.hex()


class Gate:
    """ASGI middleware around the whole application.

    Args:
        unlogged: paths whose requests are not logged; None logs none at all.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, quotas: Quotas, metrics: Metrics, unlogged: frozenset[str] | None
    ) -> None:
        self._app = app
        self._unlogged = unlogged
        self._keys = keys
        self._quotas = quotas
        self._metrics = metrics
        self._clock = LoopClock(metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._clock.start()
        name = name_of(scope)
        scope.setdefault("state", {})["request_id"] = name
        status: int | None = None
        start_s = time.monotonic()

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            client = self._keys.check(_header(scope, b"authorization")) if scope["path"] not in OPEN else None
            scope["state"]["client"] = client or ""
            if scope["method"] == "POST":  # what costs something
                with self._quotas.enter(client or (scope.get("client") or ("",))[0]):
                    await self._app(scope, receive, send_named)
            else:
                await self._app(scope, receive, send_named)
        except ClientGone:  # in the middle of its body; there is nobody to answer
            return
        except Exception as error:
            log_failure(error, name)
            if status is not None:  # too late for another status; the connection is broken off
                raise
            code = await _answer(send_named, error, name)
            self._metrics.refused(status or 500, code)
        finally:
            if self._unlogged is not None and scope["path"] not in self._unlogged:
                path = scope.get("raw_path", b"").decode("latin-1")  # still percent-encoded: one line stays one
                logger.info("%s %s %s %.3f s %s", scope["method"], path, status, time.monotonic() - start_s, name)


def log_failure(error: Exception, name: str) -> None:
    """Put into the log what a client is not told of its request: where it failed, and of what.

    The texts of errors that nobody foresaw may quote the request, so they are for the level of debugging alone.
    """
    if isinstance(error, EngineDeadError):
        logger.error("Request %s failed.", name, exc_info=error)
    elif not isinstance(error, OpsinError):
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("Request %s failed: %s\n%s", name, type(error).__name__, where)
        logger.debug("Request %s failed.", name, exc_info=error)


async def _answer(send: Send, error: Exception, request_id: str) -> str:
    """Tell what went wrong; returns its code."""
    status, content, headers = describe(error, request_id)
    if isinstance(error, BodyTooLargeError | EncodedBodyError | BodyTimeoutError | UnauthorizedError):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    await send_error(send, status, content, headers)
    return content.error.code or content.error.type


async def send_error(send: Send, status: int, content: ErrorBody, extra: Mapping[str, str]) -> None:
    """Send an error as the answer, with further headers."""
    body = msgspec.json.encode(content)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(key.lower().encode(), value.encode()) for key, value in extra.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
