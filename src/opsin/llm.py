"""``LLM``: the offline interface. The engine runs in the caller's process and thread, so a breakpoint works anywhere.

Names, defaults and results are vLLM's.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NoReturn, Self, TypeVar, Unpack, cast

import msgspec

from opsin import vllm_settings
from opsin.config import EngineConfig, EngineSettings
from opsin.engine.build import build_front
from opsin.engine.front import template_text
from opsin.engine.offline import OfflineCalls, ReadAhead
from opsin.errors import RequestError
from opsin.inputs import PoolingInput, PromptType
from opsin.outputs import (
    BeamSearchOutput,
    EmbeddingRequestOutput,
    PickOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from opsin.params import BeamSearchParams, PoolingParams, PoolingTask, SamplingParams
from opsin.processing.chat import ChatOptions
from opsin.processing.jinja import ContentFormat
from opsin.processing.messages import as_choices, as_conversation
from opsin.processing.messages import question as ask
from opsin.processing.pooling import missing_head
from opsin.processing.prompts import Prompt
from opsin.processing.scoring import pairs
from opsin.runner.executor import MemoryPlan
from opsin.types import ModelSpec

P = TypeVar("P", SamplingParams, PoolingParams)
Message = Mapping[str, Any]

logger = logging.getLogger(__name__)


class EngineArgs(SimpleNamespace):
    """The settings of an engine that is made later, by ``LLM.from_engine_args``: what vLLM's examples hand about.

    Every setting is an attribute, None where it was not given.
    """

    def __init__(self, model: str = "demo", **settings: Unpack[EngineSettings]) -> None:
        super().__init__(**{**dict.fromkeys(EngineSettings.__annotations__), "model": model, **settings})


class LLM:
    """A vision-language model, ready to answer.

    Args:
        model: a Hugging Face id, a local folder, or "demo" for the model inside the package.
        settings: any field of ``opsin.config``'s groups, by name. Of those that vLLM alone has, the ones that would
            change no answer are accepted, and a line in the log says so.

    Raises:
        ConfigError, UnsupportedModelError, WeightError: what is wrong, and what to do.
    """

    def __init__(self, model: str = "demo", **settings: Unpack[EngineSettings]) -> None:
        own, notices = vllm_settings.without(cast("Mapping[str, Any]", settings))
        self.config = EngineConfig.from_flat({"model": model, **own})
        for notice in notices:
            logger.warning(notice)
        self._front = build_front(self.config, streams=False)
        self._calls = OfflineCalls(self._front)
        self._close = weakref.finalize(self, self._front.close)  # `del llm`, too, ends threads and processes
        self._close.atexit = False  # then they end by themselves

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """The engine that these settings describe."""
        return cls(**vars(engine_args))

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
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        return_exceptions: bool = False,
    ) -> list[RequestOutput]:
        """Answer prompts that are already in the model's own format, placeholders included.

        Args:
            prompts: one, or several to be batched.
            sampling_params: for all, or one per prompt; the checkpoint's generation_config.json by default.
            lora_request: None, as vLLM's examples pass it: there are no adapters.
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
        _refuse_adapters(lora_request)
        items = _as_list(prompts)
        readers = [lambda item=item: self._front.read_prompt(item, mm_processor_kwargs) for item in items]
        params = _paired(sampling_params, len(items), SamplingParams, self.get_default_sampling_params)
        return self._calls.run(
            readers, params, use_tqdm=use_tqdm, priority=priority, return_exceptions=return_exceptions
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto"] | ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
        return_exceptions: bool = False,
    ) -> list[RequestOutput]:
        """Answer OpenAI-style conversations; text, pictures and videos may be interleaved.

        Pictures come as ``image_url`` (http(s), ``data:``, or ``file:`` below ``allowed_local_media_path``),
        ``image_pil`` or ``image_embeds`` parts; videos as ``video_url``, or as ``{"type": "video", "video": frames}``.
        Placeholders need not, and cannot, be written into the text.

        Args:
            messages: one conversation, or several to be batched.
            lora_request: None; see ``generate``.
            chat_template: jinja text or a path, instead of the model's own template.
            media_io_kwargs: which frames of the videos to take: ``{"video": {"num_frames": 16}}``, or by ``fps``.

        Returns, Raises:
            As ``generate``.
        """
        _refuse_adapters(lora_request)
        conversations = _conversations(messages)
        options = ChatOptions(
            chat_template=template_text(chat_template),
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            media_io_kwargs=media_io_kwargs,
        )
        readers = [lambda c=c: self._front.read_chat(c, mm_processor_kwargs, **options) for c in conversations]
        params = _paired(sampling_params, len(conversations), SamplingParams, self.get_default_sampling_params)
        with ReadAhead(readers) as ahead:
            return self._calls.run(ahead, params, use_tqdm=use_tqdm, return_exceptions=return_exceptions)

    def beam_search(
        self, prompts: PromptType | Sequence[PromptType], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """Find the ``beam_width`` likeliest answers to each prompt.

        Raises:
            RequestError, MediaError: a prompt or a picture that cannot be used.
        """
        readers = [lambda item=item: self._front.read_prompt(item) for item in _as_list(prompts)]
        return self._calls.search(readers, params)

    # ------------------------------------------------------------------------------------ vectors

    def embed(
        self,
        prompts: PoolingInput | Sequence[PoolingInput],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        return_exceptions: bool = False,
    ) -> list[EmbeddingRequestOutput]:
        """The last token's final hidden state of each prompt, normalised.

        Args:
            prompts: in the model's own format; or ``{"content": parts}``, a user's message for the chat template; or a
                picture alone.
            pooling_params: for all, or one per prompt; ``dimensions`` cuts the vectors.

        Returns, Raises:
            As ``generate``, with vectors for outputs.
        """
        items = _as_items(prompts)
        params = _paired(pooling_params, len(items), PoolingParams, PoolingParams)
        other = next((each.task for each in params if each.task != "embed"), None)
        if other is not None:
            raise RequestError(f"embed makes one vector per prompt; for the task {other!r} use encode.", param="task")
        return self._read_off(items, params, use_tqdm, mm_processor_kwargs, return_exceptions)

    def encode(
        self,
        prompts: PoolingInput | Sequence[PoolingInput],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: PoolingTask | None = None,
        use_tqdm: bool = True,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """``embed`` for any task: "embed", or "token_embed" for the vectors of all tokens.

        Args:
            pooling_task: instead of what ``pooling_params`` say.

        Returns:
            Outputs whose ``outputs.data`` is a float32 array: (dimensions,), or (tokens, dimensions).
        """
        items = _as_items(prompts)
        params = _paired(pooling_params, len(items), PoolingParams, PoolingParams)
        if pooling_task is not None:
            params = [msgspec.structs.replace(each, task=pooling_task) for each in params]
        return self._read_off(items, params, use_tqdm, mm_processor_kwargs, return_exceptions=False)

    def classify(self, prompts: PoolingInput | Sequence[PoolingInput], *, use_tqdm: bool = True) -> NoReturn:
        """vLLM's call for models with a classification head, which no served architecture has; see ``pick``.

        Raises:
            RequestError: always.
        """
        raise missing_head("classify")

    def score(
        self,
        data_1: Any,
        data_2: Any,
        *,
        use_tqdm: bool = True,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ScoringRequestOutput]:
        """How alike inputs are: the cosine of their vectors.

        Args:
            data_1: one input, or a list: text or another prompt, a picture, or ``{"content": parts}``, a user's message
                that the model's chat template renders.
            data_2: as many, or any number to compare with a single ``data_1``.

        Raises:
            As ``embed``.
        """
        first, second = (_as_items(data) for data in (data_1, data_2))
        compared = pairs(len(first), len(second))
        vectors = self.embed([*first, *second], use_tqdm=use_tqdm, mm_processor_kwargs=mm_processor_kwargs)
        left, right = vectors[: len(first)], vectors[len(first) :]
        return [ScoringRequestOutput.of(left[i], right[j]) for i, j in compared]

    # ---------------------------------------------------------------------------------- given answers

    def pick(
        self,
        images: Any,
        question: str,
        choices: Sequence[str],
        *,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> PickOutput:
        """How probable each of some given answers is. Nothing is generated.

        The pictures are encoded and the prompt is run once, however many choices there are.

        Args:
            images: one, several in a list, or None: URLs, paths, bytes, ``PIL`` pictures, uint8 arrays.
            choices: 2 to 64 different texts, spelt as the model would answer.

        Raises:
            RequestError, MediaError: what is wrong with the question, a choice or a picture.
        """
        (output,) = self.pick_chat(
            [ask(images, question)], choices, use_tqdm=False, mm_processor_kwargs=mm_processor_kwargs
        )
        return output

    def pick_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PickOutput]:
        """``pick`` for conversations, as ``chat`` takes them, batched.

        Args:
            choices: for all conversations, or one list for each.
        """
        conversations = _conversations(messages)
        params = [PoolingParams(task="pick", choices=each) for each in _choice_lists(choices, len(conversations))]
        options = ChatOptions(chat_template=template_text(chat_template), chat_template_kwargs=chat_template_kwargs)
        readers = [lambda c=c: self._front.read_chat(c, mm_processor_kwargs, **options) for c in conversations]
        with ReadAhead(readers) as ahead:
            return [output.outputs for output in self._calls.run(ahead, params, use_tqdm=use_tqdm)]

    # -------------------------------------------------------------------------------------- facts

    @property
    def memory_plan(self) -> MemoryPlan:
        """Where the device's memory goes, in bytes."""
        return self._front.engine.facts.memory

    @property
    def model_spec(self) -> ModelSpec:
        """The model's dimensions."""
        return self._front.inputs.spec

    @property
    def device(self) -> str:
        """The torch device that the model runs on."""
        return self._front.engine.facts.device

    @property
    def dtype(self) -> str:
        """Of the weights and activations, by name."""
        return self._front.engine.facts.dtype

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model; the first call may take seconds, to import transformers."""
        return self._front.inputs.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``generate`` uses when it is given none."""
        return self._front.inputs.default_sampling_params()

    def stats(self) -> dict[str, float]:
        """The engine's gauges and counters by name."""
        return self._front.engine.stats()

    def shutdown(self) -> None:
        """Stop the media workers and free the device's memory."""
        self._close()

    # ------------------------------------------------------------------------------------- inside

    def _read_off(
        self,
        items: Sequence[Any],
        params: Sequence[PoolingParams],
        use_tqdm: bool,
        mm_processor_kwargs: Mapping[str, Any] | None,
        return_exceptions: bool,
    ) -> list[Any]:
        readers = [lambda item=item: self._read_item(item, mm_processor_kwargs) for item in items]
        with ReadAhead(readers) as ahead:
            return self._calls.run(ahead, params, use_tqdm=use_tqdm, return_exceptions=return_exceptions)

    def _read_item(self, item: Any, mm_processor_kwargs: Mapping[str, Any] | None) -> Prompt:
        """What a vector is wanted of: a prompt, a message or a picture."""
        conversation = as_conversation(item)
        if conversation is None:
            return self._front.read_prompt(item, mm_processor_kwargs)
        return self._front.read_chat(conversation, mm_processor_kwargs, add_generation_prompt=False)


def _refuse_adapters(lora_request: object) -> None:
    if lora_request is not None and lora_request != []:
        raise RequestError(f"lora_request must be None: {vllm_settings.ADAPTERS}.", param="lora_request")


def _conversations(messages: Any) -> list[Sequence[Message]]:
    """One conversation or several, as a list."""
    if not isinstance(messages, list | tuple):
        raise RequestError(f"messages must be a list, got {type(messages).__name__}.", param="messages")
    given = cast("Sequence[Any]", messages)
    return [cast("Sequence[Message]", given)] if not given or isinstance(given[0], Mapping) else list(given)


def _choice_lists(choices: Any, count: int) -> list[Any]:
    """One list of choices per conversation."""
    given: list[Any] = as_choices(choices)
    if not given or not isinstance(given[0], list | tuple):
        return [given] * count
    if len(given) != count:
        raise RequestError(f"Got {len(given)} lists of choices for {count} conversations.", param="choices")
    return [as_choices(each) for each in given]


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


def _as_items(given: Any) -> list[Any]:
    """``_as_list`` for calls that also take messages and pictures."""
    return _as_list(given) if as_conversation(given) is None else [given]


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
