"""``LLM``: the offline interface. The engine runs in the caller's process and thread, so a breakpoint works anywhere.

Names, defaults and results are vLLM's.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Any, Literal, Self, TypeVar, Unpack, cast

from tqdm.auto import tqdm

from opsin.config import EngineConfig, EngineSettings
from opsin.engine.beam import beam_search
from opsin.engine.build import build_front
from opsin.engine.front import template_text
from opsin.errors import OpsinError, RequestError
from opsin.inputs import PromptType
from opsin.outputs import BeamSearchOutput, PoolingRequestOutput, RequestOutput
from opsin.params import BeamSearchParams, PoolingParams, SamplingParams
from opsin.processing.chat import ChatOptions
from opsin.processing.jinja import ContentFormat
from opsin.processing.prompts import Prompt
from opsin.runner.executor import MemoryPlan
from opsin.types import ModelSpec

Output = RequestOutput | PoolingRequestOutput
P = TypeVar("P", SamplingParams, PoolingParams)
Message = Mapping[str, Any]

_NUM_READERS = 4
_MAX_SHOWN = 32  # outputs of larger calls keep no pictures for notebooks: a data set's would fill the memory
_QUEUE_FACTOR = 2  # requests handed to the engine ahead of those that can run, so that decoding pictures keeps ahead


class LLM:
    """A vision-language model, ready to answer.

    Args:
        model: a Hugging Face id, a local folder, or "demo" for the model inside the package.
        settings: any field of ``opsin.config``'s groups, by name.

    Raises:
        ConfigError, UnsupportedModelError, WeightError: what is wrong, and what to do.
    """

    def __init__(self, model: str = "demo", **settings: Unpack[EngineSettings]) -> None:
        self.config = EngineConfig.from_flat({"model": model, **settings})
        self._front = build_front(self.config)
        self._ids = itertools.count()
        self._turn = threading.Lock()  # threads that share an engine take turns; ``AsyncLLM`` batches them

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # --------------------------------------------------------------------------------------- text

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        return_exceptions: bool = False,
    ) -> list[RequestOutput]:
        """Answer prompts that are already in the model's own format, placeholders included.

        Args:
            prompts: one, or several to be batched.
            sampling_params: for all, or one per prompt; the checkpoint's generation_config.json by default.
            priority: one per prompt, lower first; matters with ``scheduling_policy="priority"``.
            mm_processor_kwargs: settings of the picture processor for this call.
            return_exceptions: put a failed request's error in its place in the list, instead of raising it and
                aborting the others.

        Returns:
            One output per prompt, in the prompts' order.

        Raises:
            RequestError, MediaError: a prompt, a parameter or a picture that cannot be used. The engine stays usable.
            KeyboardInterrupt: Ctrl-C; every request of this call is aborted and the engine stays usable.
        """
        items = _as_list(prompts)
        readers = [lambda item=item: self._front.read_prompt(item, mm_processor_kwargs) for item in items]
        params = _paired(sampling_params, len(items), SamplingParams, self.get_default_sampling_params)
        outputs = self._run(readers, params, priority, use_tqdm, return_exceptions)
        return cast("list[RequestOutput]", outputs)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto"] | ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        return_exceptions: bool = False,
    ) -> list[RequestOutput]:
        """Answer OpenAI-style conversations; text and pictures may be interleaved.

        Pictures come as ``image_url`` (http(s), ``data:``, or ``file:`` below ``allowed_local_media_path``),
        ``image_pil`` or ``image_embeds`` parts. Placeholders need not, and cannot, be written into the text.

        Args:
            messages: one conversation, or several to be batched.
            chat_template: jinja text or a path, instead of the model's own template.

        Returns, Raises:
            As ``generate``.
        """
        if not isinstance(messages, list | tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError(f"messages must be a list, got {type(messages).__name__}.", param="messages")
        conversations = cast(
            "list[Sequence[Message]]",
            [messages] if not messages or isinstance(messages[0], Mapping) else list(messages),
        )

        options = ChatOptions(
            chat_template=template_text(chat_template),
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        readers = [lambda c=c: self._front.read_chat(c, mm_processor_kwargs, **options) for c in conversations]
        params = _paired(sampling_params, len(conversations), SamplingParams, self.get_default_sampling_params)
        with _ReadAhead(readers) as ahead:
            outputs = self._run(ahead, params, None, use_tqdm, return_exceptions)
        return cast("list[RequestOutput]", outputs)

    def beam_search(
        self, prompts: PromptType | Sequence[PromptType], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """Find the ``beam_width`` likeliest answers to each prompt.

        Raises:
            RequestError, MediaError: a prompt or a picture that cannot be used.
        """
        with self._turn, _between_steps() as interrupted:
            read = [self._front.read_prompt(item) for item in _as_list(prompts)]
            return beam_search(self._front, [(self._next_id(), prompt) for prompt in read], params, interrupted)

    # ------------------------------------------------------------------------------------ vectors

    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        return_exceptions: bool = False,
    ) -> list[PoolingRequestOutput]:
        """The last token's final hidden state of each prompt, normalised.

        Returns, Raises:
            As ``generate``, with vectors for outputs.
        """
        items = _as_list(prompts)
        readers = [lambda item=item: self._front.read_prompt(item, mm_processor_kwargs) for item in items]
        params = _paired(pooling_params, len(items), PoolingParams, PoolingParams)
        outputs = self._run(readers, params, None, use_tqdm, return_exceptions)
        return cast("list[PoolingRequestOutput]", outputs)

    def encode(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput]:
        """``embed``, by the name that it had in vLLM at first."""
        return self.embed(prompts, pooling_params, use_tqdm=use_tqdm)

    # -------------------------------------------------------------------------------------- facts

    @property
    def memory_plan(self) -> MemoryPlan:
        """Where the device's memory goes, in bytes."""
        return self._front.engine.facts.memory

    @property
    def model_spec(self) -> ModelSpec:
        """The model's dimensions."""
        return self._front.inputs.spec

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model."""
        return self._front.inputs.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``generate`` uses when it is given none."""
        return self._front.inputs.default_sampling_params()

    def stats(self) -> dict[str, float]:
        """The engine's gauges and counters by name."""
        return self._front.engine.stats()

    def shutdown(self) -> None:
        """Stop the media workers and free the device's memory."""
        self._front.close()

    # ------------------------------------------------------------------------------------- inside

    def _next_id(self) -> str:
        return str(next(self._ids))

    def _run(
        self,
        readers: Sequence[Callable[[], Prompt]],
        params: Sequence[SamplingParams | PoolingParams],
        priority: Sequence[int] | None,
        use_tqdm: bool,
        return_exceptions: bool,
    ) -> list[Output | OpsinError]:
        """Run prompts to their end; each is read only when its turn is near, beside the steps of those before it."""
        if priority is not None and len(priority) != len(readers):
            raise RequestError(f"priority has {len(priority)} entries for {len(readers)} prompts; give one per prompt.")
        front = self._front
        results: list[Output | OpsinError | None] = [None] * len(readers)
        index_of: dict[str, int] = {}
        most_waiting = _QUEUE_FACTOR * front.engine.facts.max_num_seqs
        position = 0

        def num_decoded() -> int:
            return int(front.engine.stats()["num_pictures_decoded_total"])

        progress = _Progress(len(readers), num_decoded()) if use_tqdm else None

        def settle(request_id: str, result: Output | OpsinError) -> None:
            if isinstance(result, OpsinError) and not return_exceptions:
                raise result
            results[index_of.pop(request_id)] = result
            if progress is not None:
                progress.advance(result, num_decoded())

        self._turn.acquire()
        try:
            with _between_steps() as interrupted:
                while position < len(readers) or index_of:
                    while position < len(readers) and front.num_unfinished < most_waiting and not interrupted():
                        request_id = self._next_id()
                        index_of[request_id] = position
                        level = 0 if priority is None else priority[position]
                        try:
                            front.submit(
                                request_id,
                                readers[position](),
                                params[position],
                                priority=level,
                                thumbnails=len(readers) <= _MAX_SHOWN,
                            )
                        except RequestError as error:
                            settle(request_id, error)
                        position += 1
                    batch = front.step()
                    for request_id, error in batch.failures.items():
                        settle(request_id, error)
                    for output in batch.outputs:
                        settle(output.request_id, output)
                    if interrupted():
                        raise KeyboardInterrupt
        finally:
            for request_id in index_of:
                front.abort(request_id)
            front.come_to_rest()
            self._turn.release()
            if progress is not None:
                progress.close()
        return [result for result in results if result is not None]


class _ReadAhead:
    """Reads the next prompts on a few threads beside the steps of those before them: their pictures may be far away.

    Entered, it gives one reader per prompt, to be called in order.
    """

    def __init__(self, readers: Sequence[Callable[[], Prompt]]) -> None:
        self._readers = readers
        self._jobs: deque[Future[Prompt]] = deque()
        self._num_begun = 0
        self._threads = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="opsin-read")

    def __enter__(self) -> list[Callable[[], Prompt]]:
        return [self._next] * len(self._readers)

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _next(self) -> Prompt:
        while len(self._jobs) < 2 * _NUM_READERS and self._num_begun < len(self._readers):
            self._jobs.append(self._threads.submit(self._readers[self._num_begun]))
            self._num_begun += 1
        return self._jobs.popleft().result()


class _Progress:
    """A bar with answers, tokens per second and pictures per second."""

    def __init__(self, total: int, pictures_before: int) -> None:
        self._bar = tqdm(total=total, desc="Answers", dynamic_ncols=True)
        self._started = time.perf_counter()
        self._pictures_before = pictures_before
        self._tokens = 0

    def advance(self, result: Output | OpsinError, pictures_decoded: int) -> None:
        if isinstance(result, RequestOutput):
            self._tokens += sum(len(answer.token_ids) for answer in result.outputs)
        seconds = max(time.perf_counter() - self._started, 1e-9)
        pictures = (pictures_decoded - self._pictures_before) / seconds
        self._bar.set_postfix_str(f"{self._tokens / seconds:.1f} tokens/s, {pictures:.1f} pictures/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def _between_steps() -> Iterator[Callable[[], bool]]:
    """Keep Ctrl-C from striking inside a step, where it would leave the engine's state half changed.

    Yields a function that tells whether Ctrl-C was pressed. A second one interrupts at once all the same.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed:
            before(number, frame)
        pressed.append(number)

    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _as_list(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """One prompt (a string, a dict, or token ids) or several, as a list."""
    if isinstance(prompts, str | Mapping):
        return [cast("PromptType", prompts)]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}.")
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [cast("PromptType", items)]
    return cast("list[PromptType]", items)


def _paired(params: P | Sequence[P] | None, count: int, kind: type[P], default: Callable[[], P]) -> list[P]:
    """One set of parameters per prompt."""
    if params is None:
        return [default()] * count
    if isinstance(params, kind):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, kind) for p in params):
        got = type(params).__name__
        raise RequestError(f"The parameters must be {kind.__name__}, or a list with one per prompt; got {got}.")
    if len(params) != count:
        raise RequestError(f"Got {len(params)} sets of parameters for {count} prompts; give one, or one per prompt.")
    return list(params)
