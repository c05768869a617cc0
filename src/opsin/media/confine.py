"""Bounds of processes that do strangers' work."""

from __future__ import annotations

import resource


def confine(max_memory_bytes: int) -> None:
    """Bound the calling process's address space for good, and let it leave no core behind.

    Where the process may have less already, as batch systems set it, that stays: it cannot be raised.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = max_memory_bytes if hard == resource.RLIM_INFINITY else min(max_memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
