"""Requests that are run to their ends, one or many at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from opsin.errors import EngineDeadError
from opsin.outputs import PoolingRequestOutput, RequestOutput
from opsin.processing.processor import ProcessedRequest
from opsin.server.client import EngineClient

T = TypeVar("T")


async def run_whole(engine: EngineClient, processed: ProcessedRequest) -> RequestOutput | PoolingRequestOutput:
    """The only output of a request that is told of at its end. Cancelling it ends what runs.

    Raises:
        OpsinError: what became of it.
    """
    async with contextlib.aclosing(engine.stream(processed, "final")) as outputs:
        async for output in outputs:
            return output
    raise EngineDeadError("The engine stopped before the request was answered.")


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of these come to, in their order, run at once. Where one fails, the others are ended.

    Raises:
        Exception: as the first that failed.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as failures:  # one cause is enough, and its class decides the status
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
