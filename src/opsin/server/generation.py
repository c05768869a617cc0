"""The road of a generating request, the same for chats and completions: admit, prepare, run, and answer or stream.

What differs is a ``Form``: how outputs are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec
from msgspec import UNSET
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.outputs import PoolingRequestOutput, RequestOutput
from opsin.processing.output import OutputKind
from opsin.processing.processor import ProcessedRequest
from opsin.server.answers import PromptTokensDetails, Usage
from opsin.server.errors import ErrorBody, describe
from opsin.server.gate import log_failure
from opsin.server.requests import StreamOptions
from opsin.server.state import ServerState
from opsin.server.transport import ClientGone, EventStream, GoneResponse, json_response, until_gone


class Framing(NamedTuple):
    """How the events of a stream are sent.

    Attributes:
        frame: an event, and the blank line that ends it.
        end: what follows the last event of a stream that did not fail.
    """

    frame: Callable[[msgspec.Struct], bytes]
    end: bytes


def _data(event: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


DATA = Framing(_data, b"data: [DONE]\n\n")
"""As chats and completions are streamed: data alone, and a word at the end."""


class Form(Protocol):
    """How outputs become bodies; made anew for every request."""

    def opening(self) -> Sequence[msgspec.Struct]:
        """Events before the first token."""
        ...

    def events(
        self, prompt: int, output: RequestOutput, usage: Usage | msgspec.UnsetType | None
    ) -> Sequence[msgspec.Struct]:
        """What is new in the answers to one prompt."""
        ...

    def closing(self, usage: Usage, *, tell_usage: bool) -> Sequence[msgspec.Struct]:
        """Events behind the last token.

        Args:
            tell_usage: the client has asked for the token counts.
        """
        ...

    def failure(self, body: ErrorBody) -> msgspec.Struct:
        """The event that ends a stream that failed."""
        ...

    @property
    def framing(self) -> Framing:
        """How events are sent."""
        ...

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> msgspec.Struct:
        """The body of an answer that is not streamed.

        Args:
            outputs: finished, per prompt.
        """
        ...


class Streams(Protocol):
    """What runs requests: an ``EngineClient``, or something before one."""

    def stream(
        self, processed: ProcessedRequest, output_kind: OutputKind = "cumulative"
    ) -> AsyncGenerator[RequestOutput | PoolingRequestOutput, None]:
        """Run what was prepared. Closing the generator aborts it."""
        ...


@dataclass(slots=True)
class Tally:
    """The tokens of one HTTP request, over all its prompts, and how many of these are still answered."""

    details: bool
    num_running: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    media_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict[int, int])

    def usage(self) -> Usage:
        details = PromptTokensDetails(sum(self.cached.values()), self.media_tokens) if self.details else UNSET
        total = self.prompt_tokens + self.completion_tokens
        return Usage(self.prompt_tokens, self.completion_tokens, total, details)


@dataclass(slots=True)
class _Progress:
    """How far the answers to one prompt are, in tokens by their index, and when the last one came."""

    lengths: dict[int, int] = field(default_factory=dict[int, int])
    last_s: float | None = None

    def take(self, output: RequestOutput, now_s: float) -> tuple[int, float | None]:
        """How many tokens are new, and the seconds that each took; None where there were none before them."""
        new = steps = 0
        for answer in output.outputs:
            count = len(answer.token_ids)
            new += count
            steps = max(steps, count)
            self.lengths[answer.index] = self.lengths.get(answer.index, 0) + count
        before_s, self.last_s = self.last_s, now_s
        return new, (now_s - before_s) / steps if before_s is not None and steps else None


async def respond(
    http: HTTPRequest,
    server: ServerState,
    form: Form,
    prepare: Callable[[], Awaitable[list[ProcessedRequest]]],
    *,
    num_answers: int,
    stream: bool,
    options: StreamOptions | None,
    engine: Streams | None = None,
) -> Response:
    """Run a request and answer it.

    The status waits for the first token, since only then it is known that the pictures could be decoded.

    Args:
        num_answers: places to take in the queue.
        engine: what runs the requests; the server's engine by default.

    Raises:
        OpsinError: it cannot be answered.
    """
    tally = Tally(server.config.enable_prompt_tokens_details)
    outputs = _run(server, engine or server.engine, tally, prepare, num_answers, "delta" if stream else "final")
    try:
        if stream:
            first = await until_gone(http.receive, anext(outputs))
            return EventStream(_events(http, server, form, tally, first, outputs, options or StreamOptions()))
        return await until_gone(http.receive, _whole(form, tally, outputs))
    except ClientGone:
        return GoneResponse()


_Numbered = tuple[int, RequestOutput]


async def _whole(form: Form, tally: Tally, outputs: AsyncGenerator[_Numbered, None]) -> Response:
    async with contextlib.aclosing(outputs):
        finished = {prompt: output async for prompt, output in outputs}

    def write() -> Response:
        return json_response(form.whole([finished[prompt] for prompt in sorted(finished)], tally.usage()))

    if any(output.prompt_logprobs for output in finished.values()):  # of a long prompt, a hundred thousand entries
        return await asyncio.to_thread(write)
    return write()


async def _events(
    http: HTTPRequest,
    server: ServerState,
    form: Form,
    tally: Tally,
    first: _Numbered,
    outputs: AsyncGenerator[_Numbered, None],
    options: StreamOptions,
) -> AsyncGenerator[bytes, None]:
    quiet = None if options.include_usage else UNSET  # OpenAI: null in all chunks but the last
    frame, end = form.framing
    # What is known together is sent together: every send is a call of the kernel's, and wakes the client.
    ready = b"".join(map(frame, form.opening()))
    async with contextlib.aclosing(outputs):
        try:
            item: _Numbered | None = first
            while item is not None:
                usage = tally.usage() if options.continuous_usage_stats else quiet
                ready += b"".join(map(frame, form.events(*item, usage)))
                if ready and tally.num_running:
                    yield ready
                    ready = b""
                item = await anext(outputs, None)
        except Exception as error:
            # Clients would take a stream that merely ends for a short answer.
            name = http.scope["state"]["request_id"]
            status, body, _ = describe(error, name)
            log_failure(error, name)
            server.metrics.refused(status, body.error.code or body.error.type)
            yield ready + frame(form.failure(body))
            return
    closing = form.closing(tally.usage(), tell_usage=bool(options.include_usage))
    if last := ready + b"".join(map(frame, closing)) + end:
        yield last


async def _run(
    server: ServerState,
    engine: Streams,
    tally: Tally,
    prepare: Callable[[], Awaitable[list[ProcessedRequest]]],
    num_answers: int,
    kind: OutputKind,
) -> AsyncGenerator[_Numbered, None]:
    """Outputs by the number of their prompt. Closing it ends everything that runs."""
    metrics = server.metrics
    with server.admission.enter(num_answers):
        prepared = await prepare()
        for processed in prepared:
            num_tokens = len(processed.request.prompt_token_ids)
            tally.prompt_tokens += num_tokens
            tally.media_tokens += sum(span.length for span in processed.request.spans)
            metrics.admitted(num_tokens, len(processed.sources))
        running = {prompt: _Progress() for prompt in range(len(prepared))}
        tally.num_running = len(running)
        try:
            async with contextlib.aclosing(_merged(engine, prepared, kind)) as outputs:
                async for prompt, output in outputs:
                    now_s = time.monotonic()
                    new, token_s = running[prompt].take(output, now_s)
                    tally.completion_tokens += new
                    tally.cached[prompt] = output.num_cached_tokens
                    metrics.generated(new, token_s)
                    if output.finished:
                        longest = max(running.pop(prompt).lengths.values(), default=0)
                        tally.num_running = len(running)
                        metrics.finished(output.outputs[0].finish_reason or "stop", output.metrics, now_s, longest)
                    yield prompt, output
        except Exception:
            for _ in running:
                metrics.finished("error", None, 0.0)
            running.clear()
            raise
        finally:
            for _ in running:  # the client has left
                metrics.finished("abort", None, 0.0)


async def _merged(
    engine: Streams, prepared: Sequence[ProcessedRequest], kind: OutputKind
) -> AsyncGenerator[_Numbered, None]:
    """The outputs of all prompts as they come."""
    if len(prepared) == 1:  # no task and no queue between the engine and the client
        async with contextlib.aclosing(engine.stream(prepared[0], kind)) as outputs:
            async for output in outputs:
                assert isinstance(output, RequestOutput)
                yield 0, output
        return
    queue: asyncio.Queue[_Numbered | Exception | None] = asyncio.Queue()

    async def pump(prompt: int, processed: ProcessedRequest) -> None:
        try:
            async with contextlib.aclosing(engine.stream(processed, kind)) as outputs:
                async for output in outputs:
                    assert isinstance(output, RequestOutput)
                    queue.put_nowait((prompt, output))
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    pumps = [asyncio.create_task(pump(prompt, processed)) for prompt, processed in enumerate(prepared)]
    try:
        unfinished = len(pumps)
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
