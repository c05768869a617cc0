"""What the server asks of an engine; ``AsyncLLM`` is one, whose engine may be a process of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol, Unpack

from opsin.engine.histogram import Histogram
from opsin.inputs import PromptType
from opsin.media.ops import PixelArray
from opsin.outputs import PoolingRequestOutput, RequestOutput
from opsin.params import PoolingParams, SamplingParams
from opsin.processing.chat import ChatOptions
from opsin.processing.output import OutputKind
from opsin.processing.processor import ProcessedRequest


class EngineClient(Protocol):
    """An engine somewhere: in this process, or in one of its own."""

    async def prepare(
        self,
        prompt: PromptType,
        params: SamplingParams | PoolingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> ProcessedRequest:
        """Read, tokenise and check one prompt.

        Raises:
            RequestError, MediaError: what is wrong with it.
            EngineDeadError: the engine has stopped.
        """
        ...

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
        """Render a conversation, fetch its pictures, and go on as ``prepare``."""
        ...

    async def look(self, processed: ProcessedRequest) -> PixelArray:
        """What the model sees of the only picture of a request: its tiles, one behind the other.

        Raises:
            RequestError, MediaError: it has no such picture, or it cannot be decoded.
        """
        ...

    def stream(
        self, processed: ProcessedRequest, output_kind: OutputKind = "cumulative"
    ) -> AsyncGenerator[RequestOutput | PoolingRequestOutput, None]:
        """Run what was prepared. Closing the generator aborts the request."""
        ...

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ...

    def get_default_sampling_params(self, max_tokens: int | None = 16) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for; ``max_tokens`` where it says nothing of it."""
        ...

    def get_chat_template(self, *, tools: bool = False) -> str | None:
        """The model's chat template; ``tools`` asks for the one that shows tools, where there are two."""
        ...

    def stats(self) -> dict[str, float]:
        """Gauges, and counters whose names end in ``_total``."""
        ...

    def histograms(self) -> dict[str, Histogram]:
        """What was observed since the engine was started."""
        ...

    def shutdown(self) -> None:
        """Abort what runs; blocks until the engine has stopped."""
        ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def is_running(self) -> bool:
        """False once it has stopped for good."""
        ...

    @property
    def is_ready(self) -> bool:
        """It takes requests now."""
        ...

    def require_running(self) -> None:
        """Raise the ``EngineDeadError`` that it stopped with, if it has."""
        ...
