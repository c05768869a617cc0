"""From the engine's updates to what callers see: text, stop strings, log-probabilities, finished answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np

from opsin.errors import EngineRestartError, MediaError, OpsinError, RequestError, RequestFailedError
from opsin.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    PickOutput,
    PoolingRequestOutput,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    SampleLogprobs,
    Thumbnails,
    TokenEmbeddingOutput,
)
from opsin.params import PoolingParams, SamplingParams
from opsin.processing.continuations import answer_logprobs, fan_out, pick_requests
from opsin.processing.detokenizer import Detokenizer, StopStrings
from opsin.processing.processor import ProcessedRequest
from opsin.processing.tokenizer import Tokenizer
from opsin.types import OWN_FAULT, EngineRequest, FinishReason, PositionLogprobs, RequestUpdate

OutputKind = Literal["final", "cumulative", "delta"]

ENGINE_RESTARTED = "engine_restarting"
"""Error code of the updates that end what a dead engine process was running."""


@dataclass(slots=True)
class OutputBatch:
    """What a batch of updates came to.

    Attributes:
        outputs: at most one per request, of those that have something to say.
        aborts: engine request ids that need not run on: a stop string ended them, or a sibling failed.
        failures: requests that ended in an error, by the id that the caller gave.
    """

    outputs: list[RequestOutput | PoolingRequestOutput] = field(
        default_factory=list[RequestOutput | PoolingRequestOutput]
    )
    aborts: list[str] = field(default_factory=list[str])
    failures: dict[str, OpsinError] = field(default_factory=dict[str, OpsinError])


class OutputProcessor:
    """Keeps the text state of every running request.

    Args:
        clock: seconds; the one that requests' ``arrival_s`` come from.
    """

    def __init__(self, tokenizer: Tokenizer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokenizer = tokenizer
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self._children: dict[str, tuple[_Request, int]] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def add(
        self, processed: ProcessedRequest, kind: OutputKind = "final", *, thumbnails: Thumbnails | None = None
    ) -> list[EngineRequest]:
        """Start to follow a request.

        Args:
            kind: "final" says something once, at the end; "cumulative" everything so far, and "delta" what is new,
                whenever there is something new.

        Returns:
            What to give the engine: one request per answer.

        Raises:
            RequestError: a running request has the same id.
        """
        request = processed.request
        if processed.answers:
            children = pick_requests(request, list(chain.from_iterable(processed.answers)))
        else:
            children = fan_out(request, request.params.n if isinstance(request.params, SamplingParams) else 1)
        taken = request.request_id in self._requests or any(c.request_id in self._children for c in children)
        if taken:
            raise RequestError(
                f"A request with the id {request.request_id!r} is running; ids must be unique.", param="request_id"
            )
        state = _Request(processed, children, kind, self._tokenizer, thumbnails)
        self._requests[request.request_id] = state
        for i, child in enumerate(children):
            self._children[child.request_id] = (state, i)
        return children

    def update(self, updates: Iterable[RequestUpdate]) -> OutputBatch:
        """Take in what steps did. Updates of requests that ended already are ignored."""
        batch = OutputBatch()
        changed: dict[str, _Request] = {}
        now = self._clock()
        for update in updates:
            found = self._children.get(update.request_id)
            if found is None:
                continue
            request, index = found
            if update.error is not None:
                batch.failures[request.request_id] = failure_of(update, request.media_params)
                changed.pop(request.request_id, None)
                batch.aborts += [i for i in self._forget(request) if i != update.request_id]
                continue
            stopped_here = request.take(index, update, now)
            if stopped_here:
                batch.aborts.append(update.request_id)
            if request.answers[index].finish_reason is not None:
                del self._children[update.request_id]
            changed[request.request_id] = request
        for request in changed.values():
            if request.finished:
                self._forget(request)
            if output := request.output(now):
                batch.outputs.append(output)
        return batch

    def abort(self, request_id: str) -> tuple[list[str], RequestOutput | PoolingRequestOutput | None]:
        """Stop following a request, by the caller's id.

        Returns:
            The engine ids to abort, and the request's last output, finished with reason "abort"; ([], None) for a
            request that is not running.
        """
        request = self._requests.get(request_id)
        if request is None:
            return [], None
        ids = self._forget(request)
        request.abort()
        return ids, request.output(self._clock())

    def _forget(self, request: _Request) -> list[str]:
        """Drop a request; the ids of its answers that were still running."""
        self._requests.pop(request.request_id, None)
        return [child for child in request.child_ids if self._children.pop(child, None) is not None]


class _Answer:
    """One growing answer.

    Args:
        is_told_once: nobody sees it before its end, so that its text can be made there at once.
    """

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer, is_told_once: bool) -> None:
        self._index = index
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer = (
            Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens) if params.detokenize else None
        )
        self._stops = StopStrings(params.stop) if params.stop else None
        self._pieces: list[str] = []  # released text, not yet joined
        self._held = ""  # text that may be the beginning of a stop string
        self._unread: list[int] | None = [] if is_told_once and self._detokenizer and not self._stops else None
        self.token_ids: list[int] = []
        self.logprobs: SampleLogprobs | None = [] if params.logprobs is not None else None
        self.cumulative_logprob: float | None = 0.0 if params.logprobs is not None else None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._told_pieces = 0
        self._told_tokens = 0
        self._told_end = False

    def take(self, update: RequestUpdate) -> bool:
        """Take in new tokens; True when a stop string ends the answer here."""
        ends_by_token = update.stop_token_id is not None
        for i, token in enumerate(update.token_ids):
            self.token_ids.append(token)
            if update.logprobs is not None and self.logprobs is not None:
                self._take_logprobs(update.logprobs[i])
            last = i == len(update.token_ids) - 1
            shown = not (last and ends_by_token and not self._params.include_stop_str_in_output)
            if self._detokenizer is None or not shown:
                continue
            if self._unread is not None:
                self._unread.append(token)
            elif self._release(self._detokenizer.add(token)):
                return True
        if update.finish_reason is not None:
            if self._release(self._rest()):
                return False  # it had ended anyway, but the stop string is the better reason
            self._end(update.finish_reason)
            ends_by_itself = not self._params.ignore_eos and update.stop_token_id in self._tokenizer.eos_token_ids
            if ends_by_token and not ends_by_itself:
                self.stop_reason = update.stop_token_id
        return False

    def abort(self) -> None:
        if self.finish_reason is None:
            self._held += self._rest()
            self._end("abort")

    def output(self, delta: bool) -> CompletionOutput:
        """What is known, or what is new since the last call."""
        pieces = self._pieces[self._told_pieces :] if delta else self._pieces
        first = self._told_tokens if delta else 0
        output = CompletionOutput(
            index=self._index,
            text="".join(pieces),
            token_ids=self.token_ids[first:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[first:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._told_pieces, self._told_tokens = len(self._pieces), len(self.token_ids)
        self._told_end = self.finish_reason is not None
        return output

    @property
    def has_news(self) -> bool:
        return self._told_tokens < len(self.token_ids) or (self.finish_reason is not None and not self._told_end)

    def _rest(self) -> str:
        """The text that is still to come at the answer's end."""
        if self._detokenizer is None:
            return ""
        return self._detokenizer.flush() if self._unread is None else self._detokenizer.read(self._unread)

    def _release(self, text: str) -> bool:
        """Pass on new text, but for what may begin a stop string; True when one is complete, which ends the answer."""
        if self._stops is None:
            self._pieces.append(text)
            return False
        before = self._stops.length - len(self._held)  # where the held text begins
        if len(self.token_ids) <= self._params.min_tokens:
            self._stops.skip(text)
            match = None
        else:
            match = self._stops.add(text)
        text = self._held + text
        if match is not None:
            end = match.end if self._params.include_stop_str_in_output else match.start
            self._pieces.append(text[: end - before])
            self._held = ""
            self.finish_reason, self.stop_reason = "stop", match.stop
            return True
        free = len(text) if self._params.include_stop_str_in_output else len(text) - self._stops.pending
        self._pieces.append(text[:free])
        self._held = text[free:]
        return False

    def _end(self, reason: FinishReason) -> None:
        self._pieces.append(self._held)
        self._held = ""
        self.finish_reason = reason

    def _take_logprobs(self, position: PositionLogprobs) -> None:
        assert self.logprobs is not None
        assert self.cumulative_logprob is not None
        self.logprobs.append(_named(position, self._tokenizer))
        self.cumulative_logprob += position[0].logprob


class _Request:
    """A caller's request: its prompt and its answers."""

    def __init__(
        self,
        processed: ProcessedRequest,
        children: list[EngineRequest],
        kind: OutputKind,
        tokenizer: Tokenizer,
        thumbnails: Thumbnails | None,
    ) -> None:
        request = processed.request
        self.request_id = request.request_id
        self.child_ids = [child.request_id for child in children]
        params = request.params
        self._pooling = params if isinstance(params, PoolingParams) else None
        self._children = children
        self._spellings = processed.answers
        self.media_params = processed.params
        self._values: list[list[bytes]] = [[] for _ in children]
        self.answers = [
            _Answer(i, params if isinstance(params, SamplingParams) else SamplingParams(), tokenizer, kind == "final")
            for i in range(len(children))
        ]
        self._prompt = processed.prompt
        self._prompt_ids = request.prompt_token_ids
        self._num_media = sum(span.length for span in request.spans)
        self._kind = kind
        self._tokenizer = tokenizer
        self._thumbnails = thumbnails
        self._metrics = RequestMetrics(arrival_time=request.arrival_s)
        self._num_cached = 0
        self._embedding: list[float] | None = None
        wants = isinstance(params, SamplingParams) and params.prompt_logprobs is not None
        self._prompt_logprobs: PromptLogprobs | None = [None] if wants else None

    @property
    def finished(self) -> bool:
        for answer in self.answers:  # asked for every token, and so no generator
            if answer.finish_reason is None:
                return False
        return True

    def take(self, index: int, update: RequestUpdate, now: float) -> bool:
        """Take in one update; True when a stop string ends that answer."""
        answer = self.answers[index]
        before = len(answer.token_ids)
        stopped = answer.take(update)
        if index == 0:  # what its siblings find is mostly what this one computed for them
            self._num_cached = max(self._num_cached, update.num_cached_tokens)
        self._embedding = update.embedding or self._embedding
        self._values[index] = update.values or self._values[index]
        if index == 0 and update.prompt_logprobs and self._prompt_logprobs is not None:
            self._prompt_logprobs += [_named(p, self._tokenizer) for p in update.prompt_logprobs if p is not None]
        new = len(answer.token_ids) - before
        if new:
            self._metrics.first_scheduled_time = self._metrics.first_scheduled_time or update.scheduled_s
            self._metrics.first_token_time = self._metrics.first_token_time or now
            self._metrics.last_token_time = now
            self._metrics.num_generation_tokens += new
        return stopped

    def abort(self) -> None:
        for answer in self.answers:
            answer.abort()

    def output(self, now: float) -> RequestOutput | PoolingRequestOutput | None:
        """What to tell the caller now, or None."""
        finished = self.finished
        if self._pooling is not None:
            pooled = self._pooled(self._pooling) if finished else None
            if pooled is None:
                return None
            if isinstance(pooled, EmbeddingOutput):
                return EmbeddingRequestOutput(self.request_id, pooled, self._prompt_ids, True, self._num_cached)
            return PoolingRequestOutput(self.request_id, pooled, self._prompt_ids, True, self._num_cached)
        if finished:
            self._metrics.finished_time = now
        if self._kind == "final":
            answers = self.answers if finished else []
        else:
            answers = [answer for answer in self.answers if answer.has_news]
        if not answers:
            return None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=[answer.output(self._kind == "delta") for answer in answers],
            finished=finished,
            metrics=self._metrics,
            num_cached_tokens=self._num_cached,
            num_media_tokens=self._num_media,
            thumbnails=self._thumbnails,
        )

    def _pooled(self, params: PoolingParams) -> EmbeddingOutput | TokenEmbeddingOutput | PickOutput | None:
        """What was read; None for a request that was aborted."""
        if self._embedding is not None:
            return EmbeddingOutput(self._embedding)
        if not all(self._values):
            return None
        if params.task == "token_embed":
            return TokenEmbeddingOutput(np.stack([np.frombuffer(row, np.float32) for row in self._values[0]]))
        weighed = [(answer_logprobs(s, self._children, self._values), s) for s in self._spellings]
        # The spelling in which the model is likelier to give one of these answers at all is its own.
        logprobs, spelling = max(weighed, key=lambda pair: np.logaddexp.reduce(pair[0]))
        return PickOutput.weigh(params.choices, logprobs, [len(answer) for answer in spelling])


def _named(position: PositionLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    return {
        entry.token_id: Logprob(entry.logprob, entry.rank, tokenizer.token_text(entry.token_id)) for entry in position
    }


def failure_of(update: RequestUpdate, params: Sequence[str | None]) -> OpsinError:
    """The error that ended a request. One with a code, ``OWN_FAULT`` too, is the request's: a broken picture, say.

    Args:
        params: per item of the request's media, where it stood in what the caller gave.
    """
    message = update.error or "The request failed."
    if update.error_code == ENGINE_RESTARTED:
        return EngineRestartError(message)
    if update.error_code is None:
        return RequestFailedError(message)
    if update.error_code == OWN_FAULT:
        return RequestError(message)
    param = None if update.failed_item is None else params[update.failed_item]
    return MediaError(message, code=update.error_code, param=param)
