"""Callers' requests to the engine and back: prompts in, outputs out. One thread drives it.

``LLM`` calls it directly; ``AsyncLLM`` keeps it on a thread of its own. Everything that touches text or pictures
happens on this side of the ``Engine``, which sees ids, keys and pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, Unpack

from opsin.config import MediaConfig
from opsin.engine.engine import Engine
from opsin.errors import ConfigError, EngineDeadError, MediaError, RequestError
from opsin.media.fetch import fetch
from opsin.media.source import EncodedPicture, PixelPicture
from opsin.outputs import PoolingRequestOutput, RequestOutput, Thumbnails
from opsin.params import PoolingParams, SamplingParams
from opsin.processing.chat import ChatOptions, ChatPrompt, MediaReference
from opsin.processing.embeddings import GivenFeatures
from opsin.processing.jinja import read_template
from opsin.processing.output import OutputBatch, OutputKind, OutputProcessor, failure_of
from opsin.processing.processor import InputProcessor, ProcessedRequest
from opsin.processing.prompts import MediaInput, Prompt, open_reference
from opsin.types import EngineRequest, RequestUpdate

_FETCH_THREADS = 8


class Front:
    """Input processor, engine and output processor, working as one."""

    def __init__(
        self,
        engine: Engine,
        inputs: InputProcessor,
        outputs: OutputProcessor,
        media: MediaConfig,
        runner: Literal["auto", "generate", "pooling"],
    ) -> None:
        self.engine = engine
        self.inputs = inputs
        self._outputs = outputs
        self._media = media
        self._runner = runner

    # ----------------------------------------------------------------------------------- prompts

    def read_prompt(self, prompt: Any, mm_processor_kwargs: Mapping[str, Any] | None = None) -> Prompt:
        """Read a ``PromptType`` and open its pictures; nothing is decoded.

        Raises:
            RequestError, MediaError: what is wrong with it.
        """
        return self._with_options(self.inputs.prompts.read(prompt), mm_processor_kwargs)

    def read_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Prompt:
        """Render a conversation, fetch what its URLs name, and open its pictures.

        Raises:
            RequestError, MediaError: what is wrong with it.
        """
        chat = self.inputs.prompts.render_chat(messages, **options)
        return self.open_chat(chat, self.fetch(chat.media), mm_processor_kwargs)

    def fetch(self, references: Sequence[MediaReference]) -> list[bytes | None]:
        """The bytes behind each reference that is a URL, several at a time.

        Raises:
            MediaError: one cannot be fetched.
        """
        if is_at_hand(references):  # each by itself: to hash a URL of many megabytes lets no other thread run
            return _fetched(references, lambda ref: fetch(ref.value, self._media, ref.modality))
        urls = {ref.value: ref for ref in references if _is_url(ref)}
        with ThreadPoolExecutor(max(1, min(_FETCH_THREADS, len(urls))), thread_name_prefix="opsin-fetch") as threads:
            futures = {url: threads.submit(fetch, url, self._media, ref.modality) for url, ref in urls.items()}
            return _fetched(references, lambda ref: futures[ref.value].result())

    def open_chat(
        self,
        chat: ChatPrompt,
        fetched: Sequence[bytes | None],
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str = "",
    ) -> Prompt:
        """The second half of ``read_chat``, behind ``inputs.prompts.render_chat``. Any thread may call both.

        Args:
            fetched: per item of ``chat.media`` the bytes behind it, where it is a URL.
        """
        self.check_num_bytes(fetched)
        opener = self.inputs.prompts.opener(chat.media_io_kwargs)
        media = [open_reference(ref, data, opener) for ref, data in zip(chat.media, fetched, strict=True)]
        self._check_num_pixels(media)
        given = [item.source.data.data for item in media if isinstance(item.source, GivenFeatures)]
        self.check_num_bytes([*fetched, *given])
        prompt = Prompt(chat.prompt, media=media, cache_salt=cache_salt, add_special_tokens=chat.add_special_tokens)
        return self._with_options(prompt, mm_processor_kwargs)

    def check_num_bytes(self, fetched: Iterable[bytes | memoryview | None]) -> None:
        """Hold the files of one conversation to their common limit.

        Raises:
            MediaError: ``image_file_too_large``.
        """
        total = sum(memoryview(data).nbytes for data in fetched if data is not None)
        limit = self._media.max_request_media_bytes
        if limit is not None and total > limit:
            raise MediaError(
                f"The pictures have more than {limit} bytes together (max_request_media_bytes). Send fewer or smaller "
                "ones.",
                code="image_file_too_large",
                param="messages",
            )

    def _check_num_pixels(self, media: Iterable[MediaInput]) -> None:
        sources = [item.source for item in media]
        total = sum(source.num_pixels for source in sources if not isinstance(source, GivenFeatures))
        limit = self._media.max_request_pixels
        if limit is not None and total > limit:
            raise MediaError(
                f"The pictures have {total} pixels together; at most {limit} are taken (max_request_pixels). Send "
                "fewer or smaller ones.",
                code="image_too_large",
                param="messages",
            )

    # ---------------------------------------------------------------------------------- requests

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | PoolingParams,
        *,
        kind: OutputKind = "final",
        priority: int = 0,
        thumbnails: bool = False,
    ) -> ProcessedRequest:
        """Start a request. Its outputs come from ``step``, under ``request_id``.

        Args:
            thumbnails: outputs keep the pictures, to show them in notebooks.

        Raises:
            RequestError: it cannot run here; nothing of it is left behind.
            EngineDeadError: the engine has stopped.
        """
        processed = self.inputs.process(request_id, prompt, params, priority=priority)
        self.start(processed, kind, thumbnails=thumbnails)
        return processed

    def start(self, processed: ProcessedRequest, kind: OutputKind = "final", *, thumbnails: bool = False) -> None:
        """Start a request that ``inputs.process`` made, which any thread may call. Otherwise as ``submit``."""
        request_id = processed.request.request_id
        params = processed.request.params
        makes_vectors = isinstance(params, PoolingParams) and params.task != "pick"
        if self._runner == ("generate" if makes_vectors else "pooling"):
            wanted, runner = ("vectors", "pooling") if makes_vectors else ("text", "generate")
            raise RequestError(
                f"This engine was started with runner={self._runner!r}, so it makes no {wanted}; "
                f"start one with runner={runner!r} for them."
            )
        shown = [s for s in processed.sources if thumbnails and isinstance(s, EncodedPicture | PixelPicture)]
        children = self._outputs.add(processed, kind, thumbnails=Thumbnails(shown) if shown else None)
        try:
            self.engine.add(children, processed.sources)
        except Exception:
            self.abort(request_id)
            raise

    def abort(self, request_id: str) -> RequestOutput | PoolingRequestOutput | None:
        """End a request now, and return its last output, finished with reason "abort".

        None for a request that is not running.
        """
        ids, output = self._outputs.abort(request_id)
        for child_id in ids:
            self.engine.abort(child_id)
        return output

    @property
    def num_unfinished(self) -> int:
        return self._outputs.num_unfinished

    # ------------------------------------------------------------------------------------- steps

    def step(self) -> OutputBatch:
        """One step of the engine; waits a moment if pictures are being decoded and nothing else can be done.

        Raises:
            EngineDeadError: the engine failed; no request will be answered any more.
        """
        batch = self._outputs.update(self.engine.step())
        for child_id in batch.aborts:
            self.engine.abort(child_id)
        return batch

    def run(self, requests: Sequence[tuple[EngineRequest, ProcessedRequest]]) -> dict[str, RequestUpdate]:
        """Run engine requests of at most one token each to their end, for algorithms built on top of single steps.

        Args:
            requests: each with the processed request whose pictures it shows.

        Returns:
            The update that ended each request, by id.

        Raises:
            MediaError, RequestFailedError: one of them failed.
        """
        params = {request.request_id: processed.params for request, processed in requests}
        pending = set(params)
        answers: dict[str, RequestUpdate] = {}
        try:
            for request, processed in requests:
                self.engine.add([request], processed.sources)
            while pending:
                for update in self.engine.step():
                    if update.error is not None:
                        raise failure_of(update, params.get(update.request_id, ()))
                    if update.finish_reason is not None:
                        answers[update.request_id] = update
                        pending.discard(update.request_id)
        finally:
            for request_id in pending:
                self.engine.abort(request_id)
        return answers

    def come_to_rest(self) -> None:
        """Commit the steps still in flight behind requests that have ended, so that nothing is held any more."""
        with contextlib.suppress(EngineDeadError):  # then there is nothing left to commit
            while self.engine.has_work and not self.num_unfinished:
                self.engine.step()

    def close(self) -> None:
        self.engine.close()
        self.inputs.close()

    # ------------------------------------------------------------------------------------ inside

    def _with_options(self, prompt: Prompt, options: Mapping[str, Any] | None) -> Prompt:
        """Processor settings: the engine's, then the call's, then the prompt's own."""
        if options is not None and not isinstance(options, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError(
                f"mm_processor_kwargs must be a dict, got {type(options).__name__}.", param="mm_processor_kwargs"
            )
        merged = {**self._media.mm_processor_kwargs, **(options or {}), **prompt.processor_options}
        wrong = next((key for key in merged if not isinstance(key, str)), None)  # pyright: ignore[reportUnnecessaryIsInstance]
        if wrong is not None:
            raise RequestError(
                f"mm_processor_kwargs must be keyed by strings, got {wrong!r}.", param="mm_processor_kwargs"
            )
        return replace(prompt, processor_options=merged)


def is_at_hand(references: Iterable[MediaReference]) -> bool:
    """Whether all media came with the request, as data: URLs or as objects, and no process has to look into one."""
    return all(
        ref.modality == "image" and (not isinstance(ref.value, str) or ref.is_embedding or ref.value[:5] == "data:")
        for ref in references
    )


def _is_url(reference: MediaReference) -> bool:
    return isinstance(reference.value, str) and not reference.is_embedding


def _fetched(references: Sequence[MediaReference], fetch_one: Callable[[MediaReference], bytes]) -> list[bytes | None]:
    fetched: list[bytes | None] = []
    for ref in references:
        try:
            fetched.append(fetch_one(ref) if _is_url(ref) else None)
        except RequestError as error:
            error.param = error.param or ref.param
            raise
    return fetched


def template_text(given: str | None) -> str | None:
    """The chat template that a Python caller names for one call, as text or as a path; never for callers from afar.

    Raises:
        RequestError: neither jinja text nor a readable file.
    """
    try:
        return None if given is None else read_template(given)
    except ConfigError as error:
        raise RequestError(str(error), param="chat_template") from error
