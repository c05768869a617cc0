"""From a prompt that was read to an ``EngineRequest``: tokens, features' places, cache keys, limits."""

# Arguments come from callers, so they are checked whatever their types promise.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from opsin.config import GENERATION_DEFAULTS, MediaConfig
from opsin.errors import ContextLengthError, RequestError
from opsin.media.clips import EncodedVideo, FrameSequence
from opsin.media.ops import PixelArray
from opsin.media.prober import VideoProber
from opsin.media.source import EncodedPicture
from opsin.models.rule import MediaRule, Placeholder
from opsin.params import PoolingParams, SamplingParams
from opsin.processing import expand as expansion
from opsin.processing.continuations import derive_seed, spelled
from opsin.processing.embeddings import GivenFeatures
from opsin.processing.expand import Expanded, Written
from opsin.processing.grammar import GrammarCheck
from opsin.processing.jinja import find_template
from opsin.processing.model_templates import ModelTemplates
from opsin.processing.neutral import ControlStrings, Rendered
from opsin.processing.pooling import VectorSizes
from opsin.processing.prompt_reader import PromptReader
from opsin.processing.prompts import MediaInput, MediaSource, Prompt
from opsin.processing.resolve import ParamsResolver
from opsin.processing.texts import TextLimits, check_unicode
from opsin.processing.tokenizer import Tokenizer
from opsin.types import EngineRequest, MediaItem, Modality, ModelSpec

_MODALITIES: tuple[Modality, ...] = ("image", "video")
_END_TOKENS = 16  # of a prompt given in ids, in whose sight choices are tokenised


@dataclass(frozen=True, slots=True)
class ProcessedRequest:
    """A request as the engine takes it, and what stays in front of the engine.

    Attributes:
        sources: per item of ``request.media``, what its payload is made from when the engine asks for it.
        prompt: the text, where there was one.
        answers: the tokens of the choices that are to be weighed, in each spelling.
        params: per item of ``request.media``, where it stood in what the caller gave, for error messages.
    """

    request: EngineRequest
    sources: list[MediaSource]
    prompt: str | None
    answers: list[list[list[int]]] = field(default_factory=list[list[list[int]]])
    params: list[str | None] = field(default_factory=list[str | None])


class InputProcessor:
    """Makes requests for one model, of prompts that its ``prompts`` reads.

    Args:
        max_model_len: longest prompt plus answer, in tokens.
        generation_config: the checkpoint's generation_config.json, or what stands for it.
        max_answer_len: most tokens of any answer.
        default_seed: seeds the requests that bring no seed of their own, each differently, by their ids.
        family: name of the model's, whose template is taken where the checkpoint has none.
        folder: the checkpoint, to look for its chat template.
        chat_template: jinja text that replaces the checkpoint's template.
        grammars: checks ``structured_outputs``; without one they are refused.
        vector_sizes: what ``dimensions`` may be; anything up to the hidden size by default.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        rule: MediaRule,
        spec: ModelSpec,
        *,
        media: MediaConfig,
        max_model_len: int,
        generation_config: Mapping[str, Any] | None = None,
        max_answer_len: int | None = None,
        default_seed: int = 0,
        family: str = "",
        folder: Path | None = None,
        chat_template: str | None = None,
        grammars: GrammarCheck | None = None,
        vector_sizes: VectorSizes | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.grammars = grammars
        self.rule = rule
        self.spec = spec
        self.max_model_len = max_model_len
        self._texts = TextLimits(max_model_len, tokenizer.longest_piece)
        self._probe = VideoProber(media)
        self._generation_config = generation_config or {}
        self._resolver = ParamsResolver(
            tokenizer,
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            max_answer_len=max_answer_len or max_model_len,
            vector_sizes=vector_sizes or VectorSizes(spec.hidden_size),
        )
        self._default_seed = default_seed
        plain, with_tools = (
            chat_template or find_template(folder, tokenizer.chat_template, family, tools=tools)
            for tools in (False, True)
        )
        self._placeholders: dict[Modality, Placeholder] = {
            m: rule.placeholder(m) for m in _MODALITIES if rule.max_items(m) != 0
        }
        signs = self._placeholders.values()
        self._controls = ControlStrings(
            [*tokenizer.special_strings, *(p.text for p in signs if "{index}" not in p.text)],
            {p.pattern: p.text for p in signs},
        )
        self.prompts = PromptReader(
            rule,
            ModelTemplates(plain, with_tools, tokenizer.special_tokens_map),
            self._controls,
            self._texts,
            media,
            feature_width=spec.feature_width,
            probe=self._probe,
        )
        self._slot_ids = frozenset(p.token_id for p in signs if p.token_id is not None)

    def default_sampling_params(self, max_tokens: int | None = 16) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for, over ``SamplingParams``' own defaults.

        Args:
            max_tokens: where it says nothing of it; None is what the context holds.
        """
        found = {name: self._generation_config.get(name) for name in GENERATION_DEFAULTS}
        longest = found.pop("max_new_tokens")
        given = {name: value for name, value in found.items() if value is not None}
        return SamplingParams(**given, max_tokens=max_tokens if longest is None else longest)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, whether or not the context holds them; special tokens in it are recognised.

        Raises:
            RequestError: it is far too long, or not valid Unicode.
        """
        self._texts.check_size(len(text), "prompt")
        check_unicode(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | PoolingParams,
        *,
        priority: int = 0,
        arrival_s: float | None = None,
    ) -> ProcessedRequest:
        """Tokenise, expand, and check against the model's limits.

        Raises:
            RequestError: placeholders and items differ in number, ids outside the vocabulary.
            ContextLengthError: the expanded prompt leaves no room for an answer.
            MediaError: a picture whose size this model cannot take.
        """
        if not isinstance(params, SamplingParams | PoolingParams):
            raise RequestError(f"The parameters must be SamplingParams or PoolingParams, got {type(params).__name__}.")
        # Others could not be compared with those in the line, or not be sent to an engine process.
        if not (isinstance(priority, int) and -(2**63) <= priority < 2**63):
            raise RequestError(
                f"priority is {priority!r:.100}; it must be a whole number of 64 bits.", param="priority"
            )
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            if self.grammars is None:
                raise RequestError("This engine takes no structured_outputs.", param="structured_outputs")
            self.grammars.check(params.structured_outputs)
        items = [self._media_item(item, prompt) for item in prompt.media]
        expanded, order = self._expand(prompt, items, params)
        if isinstance(params, SamplingParams) and params.truncate_prompt_tokens is not None:
            expanded, dropped = expansion.truncate(expanded, params.truncate_prompt_tokens)
            order = order[dropped:]
        items = [items[i] for i in order]
        params = self._resolver.resolve(params, expanded, items)
        ids = expanded.token_ids
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=ids,
            params=params,
            media=items,
            spans=expanded.spans,
            bidirectional=self.rule.bidirectional([(s.start, s.start + s.length) for s in expanded.spans], len(ids)),
            seed=self._seed(request_id, params),
            cache_salt=prompt.cache_salt,
            priority=priority,
            arrival_s=time.monotonic() if arrival_s is None else arrival_s,
        )
        if isinstance(params, SamplingParams):
            request.stop_token_ids = self._resolver.end_ids(params)
            request.share_prefix = params.prompt_logprobs is None  # these need every position computed
        positions = self.rule.positions(ids, items)
        if positions is not None:
            request.positions = np.asarray(positions.axes, dtype=np.int32).tobytes()
            request.position_delta = positions.delta
        text = prompt.rendered.text if prompt.rendered is not None else None
        answers = self._answers(prompt, len(ids), params) if isinstance(params, PoolingParams) else []
        media = [prompt.media[i] for i in order]
        return ProcessedRequest(request, [m.source for m in media], text, answers, [m.param for m in media])

    def make_tiles(self, processed: ProcessedRequest) -> PixelArray:
        """What the model sees of the only picture of a request: its tiles, as ``item.layout.plan`` has them.

        Raises:
            RequestError: it shows something else.
            MediaError: the picture cannot be decoded.
        """
        items, sources = processed.request.media, processed.sources
        if len(items) != 1 or not isinstance(sources[0], EncodedPicture):
            raise RequestError("Only one picture can be looked at.")
        return self._probe.make_tiles(sources[0], items[0].layout.plan)

    def close(self) -> None:
        """Stop the processes that read videos' headers and compile grammars."""
        self._probe.close()
        if self.grammars is not None:
            self.grammars.close()

    # ------------------------------------------------------------------------------------------------- inside

    def _expand(
        self, prompt: Prompt, items: Sequence[MediaItem], params: SamplingParams | PoolingParams
    ) -> tuple[Expanded, list[int]]:
        written = expansion.write(items, self.rule, self.tokenizer)
        if prompt.token_ids is not None:
            self._check_ids(prompt.token_ids)
            # First, since what an item expands to may hold the very token that marked it. Mixed modalities cannot be
            # told apart before they are matched, so they are taken as given.
            ready = expansion.match_expanded(prompt.token_ids, written) if items else None
            if ready is not None:
                return ready, list(range(len(items)))
            slotted = expansion.cut(prompt.token_ids, self._placeholders)
            written = [item.with_texts(self.tokenizer) for item in written]
        else:
            rendered = prompt.rendered or Rendered("")
            is_cut = isinstance(params, SamplingParams) and params.truncate_prompt_tokens is not None
            self._texts.check_prompt(rendered.text, is_cut)
            signs = expansion.find_signs(rendered, self._placeholders.values())
            completion = self.rule.complete(rendered.text, signs, len(items))
            special = self._adds_special(prompt, rendered, completion)
            rendered = expansion.insert(rendered, completion)
            by_modality: dict[Modality, list[Written]] = {m: [] for m in self._placeholders}
            for item, text in zip(items, written, strict=True):
                by_modality[item.modality].append(text)
            rendered = expansion.with_texts(rendered, self._placeholders, by_modality)
            slotted = expansion.tokenize(rendered, self._placeholders, self.tokenizer, add_special_tokens=special)
        expansion.check_counts(slotted.slots, items, self._placeholders)
        order = expansion.order_by_slots(slotted.slots, items)
        expanded = expansion.expand(slotted, [written[i] for i in order])
        if not expanded.token_ids:
            raise RequestError("The prompt is empty: it has no tokens.", param="prompt")
        return expanded, order

    def _adds_special(self, prompt: Prompt, rendered: Rendered, completion: Sequence[tuple[int, str]]) -> bool:
        bos = self.tokenizer.bos_token
        if bos and any(bos in text for _, text in completion):
            return False
        if prompt.add_special_tokens is not None:
            return prompt.add_special_tokens
        return not (bos and rendered.text.startswith(bos))

    def _media_item(self, item: MediaInput, prompt: Prompt) -> MediaItem:
        source, options = item.source, {**prompt.processor_options, **item.options}
        try:
            if isinstance(source, GivenFeatures):
                layout = self.rule.embedding_layout(item.modality, len(source.data), source.extras)
            elif isinstance(source, EncodedVideo | FrameSequence):
                layout = self.rule.video_layout(source.clip, options)
            else:
                layout = self.rule.layout("image", *source.size, 1, options)
        except RequestError as error:
            error.param = error.param or item.param
            raise
        # A uuid stands for the content within its salt; it can never collide with a digest, or reach another salt.
        names = [name.encode("utf-8", "surrogatepass") for name in (prompt.cache_salt, item.uuid or "")]
        identity = ("content", source.digest) if item.uuid is None else ("uuid", *names)
        try:
            told = msgspec.msgpack.encode((identity, item.modality, layout, options), order="deterministic")
        except (TypeError, ValueError, OverflowError) as error:
            raise RequestError(
                f"mm_processor_kwargs must hold plain JSON values: {error}", param="mm_processor_kwargs"
            ) from None
        return MediaItem(hashlib.blake2b(told, digest_size=32).digest(), item.modality, layout)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise RequestError("The prompt is empty: it has no tokens.", param="prompt_token_ids")
        if min(ids) < 0 or max(ids) >= self.spec.vocab_size:
            wrong = next((i for i in ids if not 0 <= i < self.spec.vocab_size and i not in self._slot_ids), None)
            if wrong is not None:
                raise RequestError(
                    f"prompt_token_ids holds {wrong}; this model's ids are 0 to {self.spec.vocab_size - 1}.",
                    param="prompt_token_ids",
                )

    def _answers(self, prompt: Prompt, length: int, params: PoolingParams) -> list[list[list[int]]]:
        """The tokens of each choice of a "pick" behind a prompt of ``length`` tokens, in each spelling."""
        if params.task != "pick":
            return []
        end = (
            prompt.rendered.text
            if prompt.rendered
            else self.tokenizer.decode((prompt.token_ids or [])[-_END_TOKENS:], skip_special_tokens=False)
        )
        for choice in params.choices:
            check_unicode(choice)
        answers = spelled(end, params.choices, self.tokenizer, self._controls)
        longest = max(len(answer) for spelling in answers for answer in spelling)
        if length + longest - 1 > self.max_model_len:
            raise ContextLengthError(
                f"The prompt has {length} tokens and the longest choice {longest}; this model's context holds "
                f"{self.max_model_len}. Shorten them.",
                param="choices",
            )
        return answers

    def _seed(self, request_id: str, params: SamplingParams | PoolingParams) -> int:
        if isinstance(params, SamplingParams) and params.seed is not None:
            return params.seed
        return derive_seed(self._default_seed, request_id)
