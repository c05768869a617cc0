"""uvicorn's HTTP protocol with what it lacks: bounds on all that is no body, in bytes and in time; errors in form."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from opsin.server.errors import ErrorBody, ErrorDetail

_MAX_HEAD_BYTES = 64 * 1024
_HEAD_S = 10.0  # from the connection, or the first byte of its next request, to the end of the head
_FRAMING = 8  # a chunk of one byte takes five more to say so


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose request line and headers are too long, or too long in coming.

    What follows a body in chunks is bounded as well, or headers behind it would be kept without end. Idle connections
    between two requests are uvicorn's own affair (``timeout_keep_alive``).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._num_extra_bytes = 0  # in this request, all but its body
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_extra_bytes -= len(body) * (1 + _FRAMING)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_extra_bytes = 0
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        self._num_extra_bytes += len(data)
        super().data_received(data)
        self._num_extra_bytes = max(self._num_extra_bytes, 0)
        if self._num_extra_bytes > _MAX_HEAD_BYTES:
            self._refuse("431 Request Header Fields Too Large", f"The head has more than {_MAX_HEAD_BYTES} bytes.")

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses."""
        self._refuse("400 Bad Request", "This is not a valid request of HTTP 1.1.")

    def _await_head(self) -> None:
        self._in_head = True
        self._head_timer = self.loop.call_later(
            _HEAD_S, self._refuse, "408 Request Timeout", f"The head did not come within {_HEAD_S:g} s."
        )

    def _end_head(self) -> None:
        self._in_head = False
        self._num_extra_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: str, message: str) -> None:
        cycle, was_in_head = self.cycle, self._in_head
        self._end_head()
        if self.transport.is_closing():
            return
        if cycle is None or (cycle.response_complete if was_in_head else not cycle.response_started):
            detail = ErrorDetail(message, "invalid_request_error", None, None)
            body = msgspec.json.encode(ErrorBody(detail))
            head = (
                f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                "Connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()  # also in the middle of an answer: where the next request begins is not known
