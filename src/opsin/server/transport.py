"""Bytes in and out: bodies under a cap, JSON answers, event streams, and noticing that a client has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, Self, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from opsin.server.bodies import MAX_TEXT_BYTES, Body, CutBody, WholeBody
from opsin.server.errors import BodyTimeoutError, BodyTooLargeError, EncodedBodyError

T = TypeVar("T")

_BODY_IDLE_S = 30.0  # a body that stops coming for so long is given up
_BODY_BYTES_PER_S = 4096  # so is one that, but for such a pause, comes more slowly
_SEND_IDLE_S = 30.0  # so is a client that stops reading its stream
_PING_S = 15.0  # proxies cut a connection on which nothing came for half a minute or more
_PING = b": ping\n\n"  # a comment: clients skip it
_GONE = 499  # nobody reads it; proxies log it so


class ClientGone(Exception):
    """The client has closed the connection; there is nobody to answer."""


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """A struct as a JSON answer."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def read_body(http: Request, max_bytes: int) -> Body:
    """The whole body; never more than the cap is held.

    Raises:
        BodyTooLargeError, EncodedBodyError, BodyTimeoutError: as they say.
        ClientGone: in the middle of it.
    """
    encoding = http.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise EncodedBodyError(f"The body is encoded as {encoding!r}; send it as it is.")
    too_large = BodyTooLargeError(f"The body is larger than {max_bytes} bytes (max_body_bytes).")
    announced = http.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    is_small = announced.isdecimal() and int(announced) <= MAX_TEXT_BYTES
    body, num_bytes = WholeBody() if is_small else CutBody(), 0
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    spare_s = 0.0
    try:
        async with asyncio.timeout(None) as patience:
            while True:
                now_s = loop.time()
                spare_s = _BODY_IDLE_S + num_bytes / _BODY_BYTES_PER_S - (now_s - begun_s)
                patience.reschedule(now_s + min(_BODY_IDLE_S, max(spare_s, 0.001)))
                message = await http.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                data = message.get("body", b"")
                num_bytes += len(data)
                if num_bytes > max_bytes:
                    raise too_large
                body.feed(data)
                if not message.get("more_body", False):
                    return body.finish()
    except TimeoutError:
        if spare_s < _BODY_IDLE_S:
            raise BodyTimeoutError(f"The body came at less than {_BODY_BYTES_PER_S} bytes a second.") from None
        raise BodyTimeoutError(f"No more of the body came for {_BODY_IDLE_S:g} s.") from None


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client closes the connection.

    Raises:
        ClientGone: it did.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


class GoneResponse(Response):
    """For a client that is not there."""

    def __init__(self) -> None:
        super().__init__(status_code=_GONE)


class EventStream(Response):
    """Server-sent events from a generator, which is closed as soon as the client is gone or stops reading.

    Where nothing is to be told for a while, a comment is sent, lest a proxy take the connection for dead.

    Args:
        events: each a whole frame; the generator tells of its own failures.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            with contextlib.suppress(ClientGone, TimeoutError):
                await until_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events, _Patience(_SEND_IDLE_S) as patience:
            pings = asyncio.create_task(_ping(send, patience))
            try:
                async for event in events:
                    message = {"type": "http.response.body", "body": event, "more_body": True}
                    patience.is_tried = True
                    await send(message)
                    patience.is_tried = False
                    patience.num_sent += 1
            finally:
                pings.cancel()
        await send({"type": "http.response.body", "body": b""})


async def _ping(send: Send, patience: _Patience) -> None:
    """Send a comment whenever no event came between two looks; each send is a frame of its own."""
    seen: int | None = None
    while True:
        await asyncio.sleep(_PING_S)
        if patience.num_sent == seen and not patience.is_tried:
            await send({"type": "http.response.body", "body": _PING, "more_body": True})
        seen = patience.num_sent


class _Patience:
    """Ends its block with TimeoutError once one and the same send was under way at two looks in a row.

    A timeout around every send would cost as much as the send.

    Attributes:
        is_tried: a send is under way.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)
        self._seen: int | None = None
        self.is_tried = False
        self.num_sent = 0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._seconds, self._look)
        await self._timeout.__aenter__()
        return self

    async def __aexit__(self, *failure: Any) -> bool | None:
        self._timer.cancel()
        return await self._timeout.__aexit__(*failure)

    def _look(self) -> None:
        seen, self._seen = self._seen, self.num_sent if self.is_tried else None
        if seen is not None and seen == self._seen:
            self._timeout.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_later(self._seconds, self._look)
