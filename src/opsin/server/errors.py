"""What every error becomes on the wire. ``TABLE`` is the whole map; docs/serving.md mirrors it.

A body is OpenAI's: ``{"error": {"message", "type", "param", "code"}}``. Only errors raised on purpose speak for
themselves; of all others a client learns the request's id, and the log the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from opsin.errors import EngineDeadError, EngineRestartError, OpsinError, RequestError, RequestFailedError


class HTTPError(OpsinError):
    """A request that the server itself refuses.

    Attributes:
        headers: to go with the answer.
    """

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.headers = dict(headers or {})


class UnauthorizedError(HTTPError):
    """No key, or a wrong one."""


class ModelNotFoundError(HTTPError):
    """Another model is served."""


class ResponseNotFoundError(HTTPError):
    """A response of before is asked for, and none is kept."""


class RouteNotFoundError(HTTPError):
    """There is nothing under this path."""


class MethodNotAllowedError(HTTPError):
    """The path is known, the method is not."""


class BodyTimeoutError(HTTPError):
    """The body stopped coming."""


class BodyTooLargeError(HTTPError):
    """The body is larger than ``max_body_bytes``, or has too much text."""


class EncodedBodyError(HTTPError):
    """The body is compressed."""


class RateLimitedError(HTTPError):
    """This client asks for too much; others may not."""


class OverloadedError(HTTPError):
    """The queue is full, or the server is about to stop."""


class LoadingError(HTTPError):
    """The server has just been started."""


class Row(NamedTuple):
    """One line of the map.

    Attributes:
        code: None is the error's own, where it has one.
        retry_after_s: told in a header, unless the error brings headers of its own; OpenAI's clients obey it.
    """

    error: type[Exception]
    status: int
    type: str
    code: str | None
    retry_after_s: int | None = None


TABLE = (
    Row(RequestError, 400, "invalid_request_error", None),
    Row(UnauthorizedError, 401, "invalid_request_error", "invalid_api_key"),
    Row(ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    Row(ResponseNotFoundError, 404, "invalid_request_error", "response_not_found"),
    Row(RouteNotFoundError, 404, "invalid_request_error", "route_not_found"),
    Row(MethodNotAllowedError, 405, "invalid_request_error", "method_not_allowed"),
    Row(BodyTimeoutError, 408, "invalid_request_error", "request_timeout"),
    Row(BodyTooLargeError, 413, "invalid_request_error", "request_too_large"),
    Row(EncodedBodyError, 415, "invalid_request_error", "unsupported_content_encoding"),
    Row(RateLimitedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    Row(OverloadedError, 503, "service_unavailable_error", "server_is_overloaded"),
    Row(LoadingError, 503, "service_unavailable_error", "model_loading", retry_after_s=5),
    Row(EngineRestartError, 503, "service_unavailable_error", "engine_restarting", retry_after_s=5),
    Row(EngineDeadError, 503, "service_unavailable_error", "engine_stopped"),
    Row(RequestFailedError, 500, "server_error", "request_failed"),
    Row(Exception, 500, "server_error", "internal_error"),
)
"""The first row whose class the error is an instance of."""

_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
_MAX_MESSAGE_CHARS = 1000  # messages name what was given, and what was given may be 64 MiB
_MAX_PARAM_CHARS = 200


class ErrorDetail(msgspec.Struct):
    """What went wrong.

    Attributes:
        message: for people.
        type: the kind of error.
        param: path of the field that is wrong.
        code: for programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """An error in OpenAI's form."""

    error: ErrorDetail


def describe(error: BaseException, request_id: str) -> tuple[int, ErrorBody, dict[str, str]]:
    """Status, body and headers for an error."""
    row = next((row for row in TABLE if isinstance(error, row.error)), TABLE[-1])
    if row.error is Exception:
        message = f"The server failed on this request. Its log says more, under the id {request_id}."
    elif row.error is EngineDeadError:
        message = "The engine has stopped; the server must be started again."
    else:
        message = _ADDRESS.sub("0x...", _shortened(str(error), _MAX_MESSAGE_CHARS))
    code = row.code or getattr(error, "code", None)
    param = getattr(error, "param", None)
    body = ErrorBody(ErrorDetail(message, row.type, param and _shortened(param, _MAX_PARAM_CHARS), code))
    headers = {} if row.retry_after_s is None else {"Retry-After": str(row.retry_after_s)}
    return row.status, body, {**headers, **getattr(error, "headers", {})}


def _shortened(text: str, max_chars: int) -> str:
    """The beginning and the end, where what to do stands."""
    half = max_chars // 2
    return text if len(text) <= max_chars else f"{text[:half]} ... {text[-half:]}"
