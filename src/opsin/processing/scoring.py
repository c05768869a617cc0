"""Which inputs are compared with which."""

from __future__ import annotations

from opsin.errors import RequestError


def pairs(num_first: int, num_second: int) -> list[tuple[int, int]]:
    """Which input of the first list is compared with which of the second: one with each, or one by one.

    Raises:
        RequestError: neither is possible.
    """
    if num_first < 1 or num_second < 1 or num_first not in (1, num_second):
        raise RequestError(
            f"Cannot compare {num_first} inputs with {num_second}: give one and any number, or two lists of the same "
            "length.",
            param="data_2",
        )
    return [(0 if num_first == 1 else i, i) for i in range(num_second)]
