"""The socket that a server listens on."""

from __future__ import annotations

import os
import socket

from opsin.errors import ConfigError
from opsin.server.config import ServerConfig

BACKLOG = 2048
"""Connections that wait to be taken."""


def listen(config: ServerConfig) -> socket.socket:
    """A socket that takes connections; to be had before a model is loaded in vain.

    Raises:
        ConfigError: the address cannot be had.
    """
    if config.uds is not None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)  # the socket is the user's own
        try:
            listener.bind(config.uds)
            listener.listen(BACKLOG)
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
        listener.listen(BACKLOG)  # two can bind the same address, but only one can listen
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror}. Choose another with --port."
        ) from error
    return listener


def url_of(listener: socket.socket, config: ServerConfig) -> str:
    """What a client on this machine calls the server behind a listener."""
    scheme = "http" if config.ssl_certfile is None else "https"
    if listener.family == socket.AF_UNIX:
        return f"{scheme}://localhost"
    host, port = listener.getsockname()[:2]
    host = str({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
