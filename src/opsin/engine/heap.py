"""Memory that was freed and that the C library keeps.

glibc takes tensors of a few MiB from its heap, and gives back only what lies at the heap's very top. Which tensors lie
there is chance, so a process that answers for days grows by jumps, up to a mark that nobody can tell from a leak.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _find() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return None


_malloc_trim = _find()


def give_back() -> bool:
    """Hand the pages of freed memory to the kernel, wherever they lie; True if there were any.

    Takes some milliseconds, of which others who allocate wait a part. Does nothing where the C library is not glibc.
    """
    return _malloc_trim is not None and bool(_malloc_trim(0))
