"""uvicorn with a life of our own: load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from opsin.errors import ConfigError
from opsin.media.sniff import hush_pillow
from opsin.server.config import ServerConfig
from opsin.server.doorway import Doorway, UnderPath
from opsin.server.listening import BACKLOG
from opsin.server.protocol import BoundedProtocol
from opsin.server.state import ServerState

Load = Callable[[threading.Event], FastAPI]
"""Makes the application, and may end with any error once the event is set."""

_YOUNG = 2000  # objects between two collections: more than are at hand in one turn of the loop, which is no garbage
_CLOSE_S = 5  # for connections to take their last bytes


def uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn is to run the application.

    Raises:
        ConfigError: a certificate or its key cannot be used.
    """
    result = uvicorn.Config(
        UnderPath(app, config.root_path) if config.root_path else app,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=_CLOSE_S,
        log_level=config.uvicorn_log_level,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
        ssl_ciphers=config.ssl_ciphers,
    )
    try:
        result.load()
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs)))
        raise ConfigError(f"TLS cannot be had with {files}: {error.strerror or error}.") from error
    return result


def run(listener: socket.socket, load: Load, announce: Callable[[FastAPI], None], config: ServerConfig) -> None:
    """Listen, load the model meanwhile, serve until SIGTERM or Ctrl-C, and let what runs finish.

    Args:
        load: runs on a thread of its own. The engine of what it makes is shut down here.
        announce: called when requests are taken.

    Raises:
        ConfigError: a certificate cannot be used.
        EngineDeadError: the engine has stopped for good; everybody was told. And whatever ``load`` raises.
    """
    hush_pillow()
    doorway = Doorway()
    settings = uvicorn_config(doorway, config)  # first: a wrong certificate should not cost the loading of a model
    loading = _Loading(load)
    server = _Server(settings, doorway, loading, announce)
    try:
        server.run(sockets=[listener])
        if not server.is_stopping:
            loading.result().state.server.engine.require_running()
    finally:
        loading.end()


class _Loading:
    """An application in the making, on a thread beside the event loop."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._is_unwanted = threading.Event()
        self._made: Future[FastAPI] = Future()
        # A daemon: nothing ends a download that hangs, and it should not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="opsin-load", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """It was made, or cannot be."""
        return self._made.done()

    def result(self) -> FastAPI:
        """What was made; raises what was raised instead."""
        return self._made.result()

    def end(self) -> None:
        """Give it up if it is not made yet, and shut its engine down if it is."""
        self._is_unwanted.set()
        self._thread.join(_CLOSE_S)
        if self._made.done() and self._made.exception() is None:
            self._made.result().state.server.engine.shutdown()

    def _run(self) -> None:
        try:
            self._made.set_result(self._load(self._is_unwanted))
        except BaseException as error:
            self._made.set_exception(error)


class _Server(uvicorn.Server):
    """The first signal refuses new work and waits for the old; the second, or the deadline, ends that as well.

    It ends by itself when the model cannot be loaded, and when the engine has stopped for good.
    """

    def __init__(
        self, config: uvicorn.Config, doorway: Doorway, loading: _Loading, announce: Callable[[FastAPI], None]
    ) -> None:
        super().__init__(config)
        self._doorway = doorway
        self._loading = loading
        self._announce = announce
        self._state: ServerState | None = None
        self._deadline_s: float | None = None

    @property
    def is_stopping(self) -> bool:
        """It was asked to."""
        return self._deadline_s is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        patience_s = 0.0 if self._state is None else self._state.config.drain_timeout_s
        self._deadline_s = now + patience_s if self._deadline_s is None else now
        if self._state is not None:
            self._state.admission.drain()

    async def on_tick(self, counter: int) -> bool:
        if self._state is None:
            if self.is_stopping or (self._loading.is_over and not self._open()):
                return True
        elif self._deadline_s is not None:
            if time.monotonic() >= self._deadline_s:
                await asyncio.to_thread(self._state.engine.shutdown)  # every stream is told
                return True
            if self._state.admission.num_admitted == 0:
                return True
        elif not self._state.engine.is_running and self._state.admission.num_admitted == 0:
            return True
        return await super().on_tick(counter)

    def _open(self) -> bool:
        """Take requests; False if there is nothing to take them."""
        try:
            app = self._loading.result()
        except BaseException:  # whoever runs the server raises it
            return False
        self._state = app.state.server
        gc.collect()
        gc.freeze()  # a million objects that stay; every full collection would look at each, and nobody be served
        gc.set_threshold(_YOUNG)
        self._doorway.open(app)
        self._announce(app)
        return True
