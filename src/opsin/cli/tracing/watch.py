"""Clocks around the engine's seams, for as long as a run is watched. What is not watched has none.

An engine in a process of its own is not seen from here; of such a one only the caller's side is recorded.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

from opsin.cli.tracing.recorder import MEDIA, CudaClock, HostClock, Recorder, RequestTimes, Span
from opsin.engine.core import EngineCore
from opsin.engine.feeder import MediaFeeder
from opsin.engine.front import Front
from opsin.engine.jpegs import JpegThread
from opsin.engine.local import LocalEngine
from opsin.kernels.nvjpeg import JpegDecoder
from opsin.media import pool
from opsin.media.pool import MediaPool
from opsin.media.raw import is_raw
from opsin.outputs import RequestOutput
from opsin.processing.output import OutputBatch, OutputProcessor
from opsin.processing.processor import InputProcessor, ProcessedRequest
from opsin.processing.prompt_reader import PromptReader
from opsin.processing.prompts import Prompt
from opsin.runner import pixels
from opsin.runner.launched import LaunchedStep
from opsin.runner.pixels import PixelLoader
from opsin.runner.runner import ModelRunner
from opsin.runner.vision import VisionStore
from opsin.scheduler import Scheduler
from opsin.types import StepPlan

_HOST_SEAMS: tuple[tuple[type, str, str], ...] = (
    (PromptReader, "render_chat", "template"),
    (Front, "read_prompt", "open"),
    (Front, "open_chat", "open"),
    (InputProcessor, "process", "tokenise"),
    (LocalEngine, "step", "waiting for pixels"),  # all else that it does has a stage of its own
    (MediaFeeder, "pump", "feeding pixels"),
    (Scheduler, "plan", "plan"),
    (LaunchedStep, "result", "waiting for the device"),
    (Scheduler, "commit", "commit"),
    (OutputProcessor, "update", "detokenise"),
)
_DEVICE_SEAMS: tuple[tuple[Any, str, str], ...] = (
    (pixels, "upload", "transfer"),  # of pixels; what else a step uploads is small and counts as its own
    (PixelLoader, "_make", "resize"),  # of pictures that came raw
    (VisionStore, "encode", "tower"),
    (ModelRunner, "_emit", "sampling"),
)


@contextlib.contextmanager
def watching() -> Iterator[Recorder]:
    """Record everything that engines of this process do inside, whoever made them and whenever.

    Steps still in flight at the end should have been waited for.
    """
    import torch

    recorder = Recorder(CudaClock() if torch.cuda.is_available() else HostClock())
    requests, pictures = _Requests(recorder), _Pictures(recorder)

    def timed(function: Callable[..., Any], clock: Callable[[str], AbstractContextManager[None]], stage: str) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock(stage):
                return function(*args, **kwargs)

        return call

    launch = ModelRunner.launch

    def timed_launch(runner: ModelRunner, plan: StepPlan) -> LaunchedStep:
        if not plan.rows and not plan.encode:
            return launch(runner, plan)
        with recorder.device_span(_kind(plan), _facts(plan)):
            return launch(runner, plan)

    with ExitStack() as patches:
        for owner, name, stage in _HOST_SEAMS:
            replacement = timed(getattr(owner, name), recorder.span, stage)
            patches.enter_context(mock.patch.object(owner, name, replacement))
        for owner, name, stage in _DEVICE_SEAMS:
            replacement = timed(getattr(owner, name), recorder.device_span, stage)
            patches.enter_context(mock.patch.object(owner, name, replacement))
        patches.enter_context(mock.patch.object(ModelRunner, "launch", timed_launch))
        requests.follow(patches)
        pictures.follow(patches)
        try:
            yield recorder
        finally:
            recorder.finish()


def _kind(plan: StepPlan) -> str:
    """What a step's time behind its tower counts as."""
    return "decode" if plan.rows and all(row.num_tokens == 1 for row in plan.rows) else "prefill"


def _facts(plan: StepPlan) -> Mapping[str, float]:
    return {"step": plan.step, "rows": len(plan.rows), "tokens": plan.num_tokens, "pictures": len(plan.encode)}


class _Requests:
    """Notes when each request passed which point."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        # By identity, and kept until the next point, so that no id is used twice.
        self._begun: dict[int, tuple[object, float]] = {}
        self._running: dict[str, tuple[float, float, float, list[bytes]]] = {}
        self._pixels_s: dict[bytes, float] = {}

    def follow(self, patches: ExitStack) -> None:
        render, read, open_chat = PromptReader.render_chat, Front.read_prompt, Front.open_chat
        process, put, update = InputProcessor.process, EngineCore.put_payload, OutputProcessor.update

        def noted_render(*args: Any, **kwargs: Any) -> Any:
            begin_s = time.monotonic()
            return self._keep(render(*args, **kwargs), begin_s)

        def noted_read(*args: Any, **kwargs: Any) -> Prompt:
            begin_s = time.monotonic()
            return self._keep(read(*args, **kwargs), begin_s)

        def noted_open(front: Front, chat: Any, *args: Any, **kwargs: Any) -> Prompt:
            begin_s = self._begun.pop(id(chat), (chat, time.monotonic()))[1]
            return self._keep(open_chat(front, chat, *args, **kwargs), begin_s)

        def noted_process(
            inputs: InputProcessor, request_id: str, prompt: Prompt, *args: Any, **kwargs: Any
        ) -> ProcessedRequest:
            read_s = time.monotonic()
            begin_s = self._begun.pop(id(prompt), (prompt, read_s))[1]
            processed = process(inputs, request_id, prompt, *args, **kwargs)
            keys = [item.key for item in processed.request.media]
            self._running[request_id] = begin_s, read_s, time.monotonic(), keys
            return processed

        def noted_put(core: EngineCore, key: bytes, payload: Any) -> None:
            self._pixels_s[key] = time.monotonic()
            put(core, key, payload)

        def noted_update(outputs: OutputProcessor, updates: Any) -> OutputBatch:
            batch = update(outputs, updates)
            for output in batch.outputs:
                if output.finished:
                    self._settle(output)
            return batch

        for owner, name, noted in (
            (PromptReader, "render_chat", noted_render),
            (Front, "read_prompt", noted_read),
            (Front, "open_chat", noted_open),
            (InputProcessor, "process", noted_process),
            (EngineCore, "put_payload", noted_put),
            (OutputProcessor, "update", noted_update),
        ):
            patches.enter_context(mock.patch.object(owner, name, noted))

    def _keep(self, result: Any, begin_s: float) -> Any:
        self._begun[id(result)] = result, begin_s
        return result

    def _settle(self, output: Any) -> None:
        started = self._running.pop(output.request_id, None)
        if started is None:  # it was under way before anybody watched
            return
        begin_s, read_s, processed_s, keys = started
        pixels_s = max([processed_s, *(self._pixels_s.get(key, processed_s) for key in keys)])
        now_s = time.monotonic()
        metrics = output.metrics if isinstance(output, RequestOutput) else None
        first_s = now_s if metrics is None or metrics.first_token_time is None else metrics.first_token_time
        last_s = now_s if metrics is None or metrics.last_token_time is None else metrics.last_token_time
        self._recorder.requests.append(
            RequestTimes(
                output.request_id, begin_s, read_s, processed_s, min(pixels_s, first_s), first_s, max(first_s, last_s)
            )
        )


class _Pictures:
    """Notes how long each picture waited for a worker, or for the device's decoder, and how long that took."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._submitted_s: dict[Any, float] = {}
        self._given: dict[Any, tuple[float, str]] = {}
        self._inline_s = 0.0

    def follow(self, patches: ExitStack) -> None:
        submit, give, finish, carry = MediaPool.submit, MediaPool._give, MediaPool._finish, pool._carried_out
        submit_jpeg, decode_jpegs = JpegThread.submit, JpegDecoder.decode

        def noted_submit(media: MediaPool, job_id: Any, source: Any, plan: Any) -> None:
            self._submitted_s[job_id] = time.monotonic()
            submit(media, job_id, source, plan)

        def noted_give(media: MediaPool, selector: Any, worker: Any, task: Any) -> None:
            self._given[task.job_id] = time.monotonic(), f"{MEDIA} worker {worker.process.pid}"
            give(media, selector, worker, task)

        def noted_carry(source: Any, plan: Any, turbo: Any) -> Any:
            self._inline_s = time.monotonic()  # one thread does these, one after the other
            return carry(source, plan, turbo)

        def noted_finish(media: MediaPool, task: Any, pixels: Any, error: Any) -> None:
            end_s = time.monotonic()
            begin_s, lane = self._given.pop(task.job_id, (self._inline_s, f"{MEDIA} thread"))
            waited_s = max(0.0, begin_s - self._submitted_s.pop(task.job_id, begin_s))
            facts = {"waited_ms": round(1e3 * waited_s, 3), "pixels": task.num_pixels}
            what = "decode picture" if is_raw(task.plan) else "decode and resize"
            self._recorder.add(Span(lane, what, begin_s, end_s, facts))
            finish(media, task, pixels, error)

        def noted_submit_jpeg(thread: JpegThread, key: bytes, picture: Any) -> None:
            self._submitted_s[id(picture.data)] = time.monotonic()
            submit_jpeg(thread, key, picture)

        def noted_decode_jpegs(decoder: JpegDecoder, jpegs: Any) -> Any:
            begin_s = time.monotonic()
            made = decode_jpegs(decoder, jpegs)
            each_s = (time.monotonic() - begin_s) / max(1, len(jpegs))  # of a batch, whose pictures nobody can part
            for i, jpeg in enumerate(jpegs):
                waited_s = max(0.0, begin_s - self._submitted_s.pop(id(jpeg.data), begin_s))
                if made[i] is not None:
                    facts = {"waited_ms": round(1e3 * waited_s, 3), "pixels": jpeg.width * jpeg.height}
                    at_s = begin_s + i * each_s
                    self._recorder.add(Span(f"{MEDIA} nvJPEG", "decode picture", at_s, at_s + each_s, facts))
            return made

        for owner, name, noted in (
            (JpegThread, "submit", noted_submit_jpeg),
            (JpegDecoder, "decode", noted_decode_jpegs),
            (MediaPool, "submit", noted_submit),
            (MediaPool, "_give", noted_give),
            (MediaPool, "_finish", noted_finish),
            (pool, "_carried_out", noted_carry),
        ):
            patches.enter_context(mock.patch.object(owner, name, noted))
