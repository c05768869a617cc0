"""Every error that opsin raises on purpose.

    OpsinError
    ├── ConfigError             the engine was asked for something it cannot be (ValueError)
    ├── UnsupportedModelError   the model folder names an architecture opsin does not have
    ├── WeightError             a checkpoint lacks, repeats or misshapes a tensor
    ├── RequestError            one request is wrong; an HTTP 4xx, the engine goes on (ValueError)
    │   ├── ContextLengthError  prompt and answer do not fit the context
    │   └── MediaError          a picture or an embedding cannot be used
    ├── RequestFailedError      one request failed through no fault of its own; an HTTP 500
    ├── EngineRestartError      the engine process ended under a request and is started again; an HTTP 503
    └── EngineDeadError         the engine stopped; no further request can be served

A message says what is wrong, what was given, what was expected, and what to do.
"""

from __future__ import annotations


class OpsinError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(OpsinError, ValueError):
    """A setting is out of range, unknown, or contradicts another one."""


class UnsupportedModelError(OpsinError):
    """The model's architecture, or a feature that its config switches on, is not implemented."""


class WeightError(OpsinError):
    """A checkpoint does not match the model: missing, unused, misshapen or unreadable tensors."""


class RequestError(OpsinError, ValueError):
    """One request is wrong. It alone fails; over HTTP it is a 4xx.

    Attributes:
        code: machine-readable reason from OpenAI's error codes, or None.
        param: path of the offending field (``messages.0.content.1.image_url``), or None.
    """

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class ContextLengthError(RequestError):
    """The expanded prompt leaves no room for an answer in the model's context."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, code="context_length_exceeded", param=param)


class MediaError(RequestError):
    """A picture, video or embedding tensor is unreadable, too large, or not what its header said."""


class RequestFailedError(OpsinError):
    """One request failed inside the engine (for example, its logits were not finite)."""


class EngineRestartError(OpsinError):
    """The engine process has ended, and is being started again; ask again in a moment."""


class EngineDeadError(OpsinError):
    """The engine has stopped and cannot take or finish requests."""
