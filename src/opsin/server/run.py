"""A listening socket, and uvicorn with an end of life of our own: drain, then stop."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from opsin.errors import ConfigError
from opsin.server.config import ServerConfig
from opsin.server.protocol import BoundedProtocol
from opsin.server.state import ServerState

_BACKLOG = 2048
_CLOSE_S = 5  # for connections to take their last bytes


def listen(config: ServerConfig) -> socket.socket:
    """A bound socket; to be had before a model is loaded in vain.

    Raises:
        ConfigError: the address cannot be had.
    """
    if config.uds is not None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)  # the socket is the user's own
        try:
            listener.bind(config.uds)
        except OSError as error:
            listener.close()
            raise ConfigError(f"Cannot listen on uds {config.uds!r}: {error.strerror}.") from error
        finally:
            os.umask(mask)
        return listener
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"Cannot listen on host {config.host!r}: {error.strerror}.") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror}. Choose another with --port."
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """What a client on this machine calls a listener."""
    if listener.family == socket.AF_UNIX:
        return "http://localhost"
    host, port = listener.getsockname()[:2]
    host = str({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn is to run the application."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_CLOSE_S,
    )


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, let what runs finish, and return.

    Raises:
        EngineDeadError: the engine has stopped for good; everybody was told.
    """
    server = _DrainingServer(uvicorn_config(app), app.state.server)
    server.run(sockets=[listener])
    if not server.is_stopping:
        app.state.server.engine.require_running()


class _DrainingServer(uvicorn.Server):
    """The first signal refuses new work and waits for the old; the second, or the deadline, ends that as well.

    It ends by itself when the engine has stopped for good.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state
        self._deadline_s: float | None = None

    @property
    def is_stopping(self) -> bool:
        """It was asked to."""
        return self._deadline_s is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._deadline_s = now + self._state.config.drain_timeout_s if self._deadline_s is None else now
        self._state.admission.drain()

    async def on_tick(self, counter: int) -> bool:
        if self._deadline_s is not None:
            if time.monotonic() >= self._deadline_s:
                await asyncio.to_thread(self._state.engine.shutdown)  # every stream is told
                return True
            if self._state.admission.num_admitted == 0:
                return True
        elif not self._state.engine.is_running and self._state.admission.num_admitted == 0:
            return True
        return await super().on_tick(counter)
