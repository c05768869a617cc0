"""``AsyncLLM``: the same engine for asyncio programs, on a thread of its own.

Calls post work to the engine's thread; outputs come back to the event loop that asked. Templates, fetching, opening
pictures and tokenising happen on threads of their own, so neither the event loop nor a step ever waits for them; only
brief conversations are read on the loop, one in each of its turns.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, TypeVar, Unpack, cast

from opsin import vllm_settings
from opsin.config import EngineConfig, EngineSettings
from opsin.engine.child import ChildProcess
from opsin.engine.engine import EngineFacts
from opsin.engine.front import Front, is_at_hand, template_text
from opsin.engine.histogram import Histogram
from opsin.engine.reading import ReadingThreads, is_brief
from opsin.engine.remote import Watch
from opsin.engine.spawn import spawn_front
from opsin.engine.thread import FrontThread, Output
from opsin.errors import EngineDeadError, RequestError
from opsin.inputs import PromptType
from opsin.media.ops import PixelArray
from opsin.media.pool import default_num_workers
from opsin.outputs import PickOutput, PoolingRequestOutput, RequestOutput
from opsin.params import PoolingParams, SamplingParams
from opsin.processing.chat import ChatOptions, ChatPrompt
from opsin.processing.jinja import ContentFormat
from opsin.processing.messages import as_choices
from opsin.processing.messages import question as ask
from opsin.processing.output import OutputKind
from opsin.processing.processor import ProcessedRequest
from opsin.processing.prompts import Prompt
from opsin.runner.executor import MemoryPlan
from opsin.types import ModelSpec

logger = logging.getLogger(__name__)

P = TypeVar("P", SamplingParams, PoolingParams)


class AsyncLLM:
    """A vision-language model that answers many callers at once.

    Args:
        model: a Hugging Face id, a local folder, or "demo" for the model inside the package.
        settings: any field of ``opsin.config``'s groups, by name, or of vLLM's as ``LLM`` takes them.

    Raises:
        ConfigError, UnsupportedModelError, WeightError: what is wrong, and what to do.
    """

    def __init__(self, model: str = "demo", **settings: Unpack[EngineSettings]) -> None:
        from opsin.engine.build import build_front  # here, since the front of an engine process needs none of it

        config = _config(model, settings)
        self._begin(config, build_front(config, streams=True))

    @classmethod
    def spawn(
        cls,
        model: str = "demo",
        *,
        watch: Watch | None = None,
        is_unwanted: threading.Event | None = None,
        child: ChildProcess | None = None,
        **settings: Unpack[EngineSettings],
    ) -> Self:
        """The same, with the engine in a process of its own: steps and callers never compete for one interpreter.

        When that process dies or hangs, the requests that it had fail with ``EngineRestartError``, and it is started
        again; when it goes on dying, ``EngineDeadError`` ends it all.

        Args:
            watch: when the process is given up.
            is_unwanted: set by whoever does not want to wait for the model any more; the process is then ended.
            child: the process, where it was started already; whoever did so sees that it ends.

        Raises:
            As the class does; EngineDeadError: the process died while it loaded the model, or was unwanted.
        """
        config = _config(model, settings)
        llm = cls.__new__(cls)
        llm._begin(config, spawn_front(config, watch or Watch(), is_unwanted or threading.Event(), child))
        return llm

    def _begin(self, config: EngineConfig, front: Front) -> None:
        self.config = config
        self._front = front
        self._ids = itertools.count()
        self._reading = ReadingThreads(front, config.media, self.require_running)
        self._thread = FrontThread(front)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # ------------------------------------------------------------------------------------ requests

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: Literal["cumulative", "delta", "final"] = "cumulative",
        priority: int = 0,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the answer to one prompt.

        Leaving the generator early (``break``, cancellation, ``aclose``) aborts the request.

        Args:
            output_kind: every output holds the whole answer so far, or what is new, or there is one at the end.

        Raises:
            RequestError, MediaError: the prompt, a parameter or a picture cannot be used.
            EngineDeadError: the engine has stopped.
        """
        params = _checked(sampling_params, SamplingParams, self.get_default_sampling_params)
        processed = await self.prepare(
            prompt, params, request_id, priority=priority, mm_processor_kwargs=mm_processor_kwargs
        )
        async with contextlib.aclosing(self.stream(processed, output_kind)) as stream:
            async for output in stream:
                assert isinstance(output, RequestOutput)
                yield output

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: Literal["cumulative", "delta", "final"] = "cumulative",
        priority: int = 0,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto"] | ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the answer to one conversation. Arguments as in ``LLM.chat``; otherwise as ``generate``."""

        params = _checked(sampling_params, SamplingParams, self.get_default_sampling_params)
        processed = await self.prepare_chat(
            messages,
            params,
            request_id,
            priority=priority,
            chat_template=template_text(chat_template),
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
            media_io_kwargs=media_io_kwargs,
        )
        async with contextlib.aclosing(self.stream(processed, output_kind)) as stream:
            async for output in stream:
                assert isinstance(output, RequestOutput)
                yield output

    async def embed(
        self, prompt: PromptType, pooling_params: PoolingParams | None = None, request_id: str | None = None
    ) -> PoolingRequestOutput:
        """The last token's final hidden state, normalised; or what else ``pooling_params`` name as their task.

        Raises:
            As ``generate``.
        """
        params = _checked(pooling_params, PoolingParams, PoolingParams)
        return await self._pooled(await self.prepare(prompt, params, request_id))

    async def pick(
        self, images: Any, question: str, choices: Sequence[str], request_id: str | None = None
    ) -> PickOutput:
        """How probable each of some given answers is. Arguments as in ``LLM.pick``.

        Raises:
            As ``generate``.
        """
        return await self.pick_chat(ask(images, question), choices, request_id)

    async def pick_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        choices: Sequence[str],
        request_id: str | None = None,
        *,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> PickOutput:
        """``pick`` for one conversation; options as in ``prepare_chat``."""
        params = PoolingParams(task="pick", choices=as_choices(choices))
        processed = await self.prepare_chat(
            messages, params, request_id, mm_processor_kwargs=mm_processor_kwargs, **options
        )
        output = (await self._pooled(processed)).outputs
        assert isinstance(output, PickOutput)
        return output

    # ------------------------------------------------- a request in two halves, for servers

    async def prepare(
        self,
        prompt: PromptType,
        params: SamplingParams | PoolingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> ProcessedRequest:
        """Read, tokenise and check a prompt, on a thread beside the engine's; ``stream`` then runs it.

        Raises:
            As ``generate``.
        """
        process = await self._processor(params, request_id, priority)
        return await self._reading.run(lambda: process(self._front.read_prompt(prompt, mm_processor_kwargs)))

    async def prepare_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | PoolingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str = "",
        **options: Unpack[ChatOptions],
    ) -> ProcessedRequest:
        """Render a conversation, fetch its pictures, and go on as ``prepare``. A slow host delays this caller alone.

        ``chat_template`` is jinja text here, never a path, since it may come from the network.
        """
        front = self._front
        process = await self._processor(params, request_id, priority)

        def finish(chat: ChatPrompt, fetched: Sequence[bytes | None]) -> ProcessedRequest:
            return process(front.open_chat(chat, fetched, mm_processor_kwargs, cache_salt))

        def begin() -> ProcessedRequest | ChatPrompt:  # each change of threads waits for the interpreter
            chat = front.inputs.prompts.render_chat(messages, **options)
            return finish(chat, front.fetch(chat.media)) if is_at_hand(chat.media) else chat

        reads_here = not mm_processor_kwargs and front.inputs.prompts.is_ready and is_brief(messages, params, options)
        begun = await (self._reading.run_here(begin) if reads_here else self._reading.run(begin))
        if isinstance(begun, ProcessedRequest):
            return begun
        fetched = await self._reading.fetch(begun.media)
        waits = any(reference.modality == "video" for reference in begun.media)
        return await self._reading.run(lambda: finish(begun, fetched), waits=waits)

    async def look(self, processed: ProcessedRequest) -> PixelArray:
        """What the model sees of the only picture that ``prepare_chat`` opened: its tiles, one behind the other.

        Raises:
            RequestError, MediaError: there is no such picture, or it cannot be decoded.
        """
        return await self._reading.run(lambda: self._front.inputs.make_tiles(processed), waits=True)

    def stream(
        self, processed: ProcessedRequest, output_kind: OutputKind = "cumulative"
    ) -> AsyncGenerator[Output, None]:
        """Run what ``prepare`` or ``prepare_chat`` made, once. Leaving the generator early aborts the request.

        Raises:
            As ``generate``.
        """
        return self._thread.stream(processed, output_kind)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, on a thread beside the event loop; special tokens in it are recognised.

        Raises:
            RequestError: it is far too long, or not valid Unicode.
        """
        inputs = self._front.inputs
        return await self._reading.run(lambda: inputs.tokenize(text, add_special_tokens=add_special_tokens))

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        tokenizer = self._front.inputs.tokenizer
        return await self._reading.run(lambda: tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream ends with ``finish_reason="abort"``. Unknown and finished ones are ignored."""
        self._thread.abort(request_id)

    # --------------------------------------------------------------------------------------- facts

    @property
    def memory_plan(self) -> MemoryPlan:
        """Where the device's memory goes, in bytes."""
        return self._front.engine.facts.memory

    @property
    def model_spec(self) -> ModelSpec:
        """The model's dimensions."""
        return self._front.inputs.spec

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self._front.inputs.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Requests that run at once."""
        return self._front.engine.facts.max_num_seqs

    @property
    def is_running(self) -> bool:
        """False for good once the engine has failed or was shut down."""
        return self._thread.is_running

    @property
    def is_ready(self) -> bool:
        """Requests are taken now; False for a while when an engine process is started again."""
        return self._thread.is_running and self._front.engine.is_ready

    @property
    def facts(self) -> EngineFacts:
        """The model's dimensions, the device, and where its memory goes."""
        return self._front.engine.facts

    def require_running(self) -> None:
        """See that the engine has not stopped for good.

        Raises:
            EngineDeadError: why it has.
        """
        self._thread.require_running()

    def stats(self) -> dict[str, float]:
        """Gauges and counters by name, as of now; counters end in ``_total``."""
        return self._front.engine.stats()

    def histograms(self) -> dict[str, Histogram]:
        """What the engine observed since it was started, by name."""
        return self._front.engine.histograms()

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model; the first call may take seconds, to import transformers."""
        return self._front.inputs.tokenizer.hf

    def get_default_sampling_params(self, max_tokens: int | None = 16) -> SamplingParams:
        """What ``generate`` uses when it is given none; ``max_tokens`` where the checkpoint says nothing of it."""
        return self._front.inputs.default_sampling_params(max_tokens)

    def picture_tokens(self, width: int, height: int) -> int:
        """What a picture of this size costs in the prompt.

        Raises:
            RequestError: the model takes no pictures, or none of this size.
        """
        options = self.config.media.mm_processor_kwargs
        return self._front.inputs.rule.layout("image", width, height, 1, options).num_features

    def get_chat_template(self, *, tools: bool = False) -> str | None:
        """The model's chat template; ``tools`` asks for the one that shows tools, where there are two."""
        return self._front.inputs.prompts.templates.source(tools=tools)

    def shutdown(self) -> None:
        """Abort what runs, stop the thread and the media workers, and free the device's memory."""
        self._thread.stop()
        self._reading.close()

    # -------------------------------------------------------------------------- on the caller's side

    async def _pooled(self, processed: ProcessedRequest) -> PoolingRequestOutput:
        """The only output of a request that generates nothing."""
        async with contextlib.aclosing(self.stream(processed, "final")) as stream:
            async for output in stream:
                assert isinstance(output, PoolingRequestOutput)
                return output
        raise EngineDeadError("The engine stopped before the request was answered.")

    async def _processor(
        self, params: SamplingParams | PoolingParams, request_id: str | None, priority: int
    ) -> Callable[[Prompt], ProcessedRequest]:
        """What makes a request of a prompt, on any thread, once the form of its answers is compiled."""
        name = f"async-{next(self._ids)}" if request_id is None else request_id
        inputs = self._front.inputs
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            await self._reading.compile(params.structured_outputs)
        return lambda prompt: inputs.process(name, prompt, params, priority=priority)


def _config(model: str, settings: EngineSettings) -> EngineConfig:
    own, notices = vllm_settings.without(cast("Mapping[str, Any]", settings))
    config = EngineConfig.from_flat({"model": model, **own})
    for notice in notices:
        logger.warning(notice)
    if config.media.media_workers is not None:
        return config
    # Strangers' pictures are decoded in processes that may die.
    return replace(config, media=replace(config.media, media_workers=default_num_workers()))


def _checked(given: P | None, kind: type[P], default: Callable[[], P]) -> P:
    """The parameters of a call, or the default ones.

    Raises:
        RequestError: something else was given.
    """
    if given is None:
        return default()
    if not isinstance(given, kind):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RequestError(f"Parameters must be {kind.__name__}, got {type(given).__name__}.")
    return given
