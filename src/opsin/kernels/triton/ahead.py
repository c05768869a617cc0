"""Kernels compiled side by side, before they are launched.

Triton compiles a kernel where it is first launched: at a start some 25 of them, one after the other, on one core of
many. Here the passes that will launch them are made beforehand for the sake of their launches: a kernel that is not in
memory yet is left out, and goes to a pool of threads that compile and load it. Three quarters of that are C++, which
does not hold Python's lock, and processes of the assembler and the C compiler.

So there is no list of kernels to keep in step with the passes, and what is compiled is what they ask for. A kernel that
they did not reach is compiled when it is first launched, as ever.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import triton
from triton import knobs

logger = logging.getLogger(__name__)


class _Threads(ThreadPoolExecutor):
    """Triton's executor: what is submitted compiles a kernel."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def ready() -> Any:
            kernel = fn(*args, **kwargs)
            _ = kernel.run  # loads it, which else its first launch does; Triton 3.6 compiles a launcher in C for that
            return kernel

        return super().submit(ready)


def compile_ahead(*works: Callable[[], None]) -> None:
    """As ``ops.CompileAhead``."""
    if not hasattr(triton, "AsyncCompileMode"):
        return
    began = time.perf_counter()
    thread = threading.get_ident()
    seen: set[tuple[Any, str]] = set()
    compiled: list[str] = []
    hook_before, listener_before = knobs.runtime.jit_cache_hook, knobs.compilation.listener

    def leave_out(*, key: str, fn: Any, compile: dict[str, Any], is_manual_warmup: bool, **rest: Any) -> bool:
        """Triton asks this where a launch finds its kernel not in memory."""
        if is_manual_warmup or threading.get_ident() != thread:  # below, and whoever else is at work in this process
            return False
        if (fn.jit_function, key) not in seen:
            seen.add((fn.jit_function, key))
            fn.jit_function.preload(compile["specialization_data"])  # only submits it, in this mode
            in_memory, *_ = fn.jit_function.device_caches[compile["device"]]
            in_memory.pop(key, None)  # where Triton 3.7 puts it at once, so that the next launch would wait for it
        return True

    def note(**heard: Any) -> None:
        """Triton tells this what has been compiled, or found on disk."""
        if not heard["cache_hit"]:
            compiled.append(heard["src"].name)
        if listener_before is not None:
            listener_before(**heard)

    knobs.runtime.jit_cache_hook, knobs.compilation.listener = leave_out, note
    try:
        with (
            warnings.catch_warnings(),  # of which Triton opens and closes thousands, and its threads each other's
            _Threads(len(os.sched_getaffinity(0))) as threads,
            # What is compiled stays out of sight until this ends, so nobody launches what is half loaded.
            triton.AsyncCompileMode(threads, ignore_errors=True) as mode,
        ):
            warnings.simplefilter("ignore", DeprecationWarning)  # as Triton does, of Python's syntax trees
            for work in works:
                work()
                if not any(compiled for _ in as_completed(mode.raw_futures)):
                    break
    except Exception as error:
        logger.warning("Kernels are compiled as they are launched, one by one: rehearsing that came to %r", error)
    finally:
        knobs.runtime.jit_cache_hook, knobs.compilation.listener = hook_before, listener_before
    if compiled:
        logger.info("Compiled %d kernels ahead in %.1f s", len(compiled), time.perf_counter() - began)
