"""How much one client may ask for. Event-loop code: no locks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opsin.server.errors import RateLimitedError

_MAX_CLIENTS = 10_000


@dataclass(slots=True)
class _Client:
    """What one client has left.

    Attributes:
        allowance: requests that it may send at ``seen_s``.
    """

    allowance: float
    seen_s: float
    num_running: int = 0


class Quotas:
    """A bucket of requests per client that fills up within a minute, and a bound on those that run at once.

    Args:
        per_minute: requests per client and minute; None is no bound.
        at_once: requests per client that are answered at the same time; None is no bound.
        clock: seconds.
    """

    def __init__(
        self, per_minute: int | None, at_once: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute = per_minute
        self._at_once = at_once
        self._clock = clock
        self._clients: dict[str, _Client] = {}

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Count one request of a client, until it is answered.

        Raises:
            RateLimitedError: it has asked for too much; its headers say when to come again.
        """
        if self._per_minute is None and self._at_once is None:
            yield
            return
        client = self._client(name)
        if self._at_once is not None and client.num_running >= self._at_once:
            raise RateLimitedError(
                f"{client.num_running} of your requests are being answered; at most {self._at_once} may at once "
                "(max_requests_per_key). Wait for one to end.",
                headers={"Retry-After": "1"},
            )
        if self._per_minute is not None and client.allowance < 1:
            wait_s = (1 - client.allowance) * 60 / self._per_minute
            raise RateLimitedError(
                f"You may send {self._per_minute} requests a minute (max_requests_per_minute); "
                f"the next one in {wait_s:.1f} s.",
                headers={
                    "Retry-After": str(math.ceil(wait_s)),
                    "x-ratelimit-limit-requests": str(self._per_minute),
                    "x-ratelimit-remaining-requests": "0",
                    "x-ratelimit-reset-requests": f"{wait_s:.1f}s",
                },
            )
        client.allowance -= 1
        client.num_running += 1
        try:
            yield
        finally:
            client.num_running -= 1

    def _client(self, name: str) -> _Client:
        now, most = self._clock(), float(self._per_minute or 1)
        client = self._clients.pop(name, None) or _Client(most, now)
        client.allowance = min(most, client.allowance + (now - client.seen_s) * most / 60)
        client.seen_s = now
        self._clients[name] = client  # at the end: those that come first have not asked for the longest time
        if len(self._clients) > _MAX_CLIENTS:
            idle = next((other for other, c in self._clients.items() if not c.num_running and c is not client), None)
            self._clients.pop(idle or "", None)
        return client
