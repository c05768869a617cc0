"""What a caller may ask of one request: ``SamplingParams``, ``PoolingParams``, ``BeamSearchParams``.

Names, defaults and meanings are vLLM's (and OpenAI's where vLLM follows it). Unknown names raise.
"""

# Values come from callers and files, so they are checked whatever their types promise.
# pyright: reportUnnecessaryIsInstance=false, reportUnnecessaryComparison=false

from __future__ import annotations

import copy
import math
from typing import Any, Literal, Self, cast

import msgspec

from opsin.errors import RequestError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_TOKEN_LIST = 4096
MAX_CHOICES = 64

PoolingTask = Literal["embed", "token_embed", "pick", "classify", "token_classify", "score"]
MAX_GRAMMAR_CHARS = 2**17
MAX_WORDS_CHARS = 2**16
_MAX_WHOLE = 2**63 - 1


class Thinking(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a model may write before an answer that has a form: anything, between two tokens.

    Attributes:
        opens: the token that begins it; beside the form's own first tokens, it may be drawn first.
        closes: the token that ends it; the form holds from the one behind it.
        is_open: the prompt has begun it already.
    """

    opens: int
    closes: int
    is_open: bool = False

    def __post_init__(self) -> None:
        for name in ("opens", "closes"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 0):
                raise RequestError(
                    f"{name} of Thinking is {getattr(self, name)!r:.200}; it must be a token id.",
                    param="structured_outputs",
                )


class StructuredOutputsParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an answer must look like; exactly one constraint.

    Attributes:
        json: a JSON schema, as text or as a dict (kept as text). Objects that list properties take no others, unless
            they say so (``additionalProperties``).
        regex: the whole answer matches it (Rust's ``regex`` syntax).
        choice: the answer is one of these strings.
        grammar: context-free, in Lark's or in GBNF's notation.
        json_object: any JSON object.
        disable_any_whitespace: JSON in its most compact form.
        whitespace_pattern: regular expression of the white space that JSON may have between its parts; by default a
            space, or a new line and its indentation.
        thinking: what may come before the answer. ``opsin serve --reasoning-parser`` fills it in.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    thinking: Thinking | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] * bool(self.json_object)
        if len(given) != 1:
            self._refuse(
                f"has {' and '.join(given) or 'no constraint'}",
                "exactly one of json, regex, choice, grammar, json_object",
            )
        if isinstance(self.json, dict):
            try:
                # Ten times as fast as the standard library: a schema of a MiB would hold an event loop up for long.
                self.json = msgspec.json.encode(self.json).decode()
            except (TypeError, ValueError, RecursionError) as error:
                self._refuse(f"has a json that is no plain JSON ({error})", "a JSON schema")
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and 0 < len(text) <= MAX_GRAMMAR_CHARS):
                self._refuse(f"has a {name} that is not", f"text of 1 to {MAX_GRAMMAR_CHARS} characters")
        words = self.choice
        if words is not None and not (
            isinstance(words, list) and words and all(isinstance(word, str) and word for word in words)
        ):
            self._refuse(f"has choice {words!r:.200}", "a non-empty list of non-empty strings")
        if words is not None and sum(map(len, words)) > MAX_GRAMMAR_CHARS:
            self._refuse("has choices that are too long", f"at most {MAX_GRAMMAR_CHARS} characters together")
        if self.thinking is not None and not isinstance(self.thinking, Thinking):
            self._refuse(f"has {self.thinking!r:.200} as thinking", "None or opsin.params.Thinking there")

    def _refuse(self, got: str, expected: str) -> None:
        raise RequestError(f"structured_outputs {got}; it must have {expected}.", param="structured_outputs")


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="sampling"):
    """How to turn logits into an answer.

    Attributes:
        n: answers per prompt; they share the prompt's cache blocks.
        temperature: 0 is greedy.
        top_k: 0 or -1 keeps the whole vocabulary.
        max_tokens: None means as many as the context holds.
        seed: makes the answer reproducible whatever else is in the batch.
        logprobs: how many alternatives to report per token; 0 reports the chosen token alone.
        logit_bias: token id to a value in [-100, 100] added to its logit.
        bad_words: strings that must not be produced.
        detokenize: False skips text, so stop strings cannot be used either.
        structured_outputs: what the answer must look like. Needs ``pip install "opsin[structured]"``.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    bad_words_token_ids: list[list[int]] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # OpenAI allows a bare string
            self.stop = [self.stop]
        for name in ("stop", "stop_token_ids", "bad_words"):  # vLLM's callers write None for "none of these"
            if getattr(self, name) is None:
                setattr(self, name, [])
        self._whole("n", 1, MAX_N)
        self._finite("temperature", 0.0, 100.0)
        self._finite("top_p", 0.0, 1.0)
        self._require(self.top_p > 0.0, "top_p", "above 0 and at most 1")
        self._whole("top_k", -1)
        self._finite("min_p", 0.0, 1.0)
        self._finite("presence_penalty", -2.0, 2.0)
        self._finite("frequency_penalty", -2.0, 2.0)
        self._finite("repetition_penalty", 1e-6, 1e6)
        self._whole("max_tokens", 1, optional=True)
        self._whole("min_tokens", 0)
        if self.max_tokens is not None:
            self._require(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens={self.max_tokens}")
        self._whole("seed", -(2**63), 2**64 - 1, optional=True)
        self._strings("stop", MAX_STOP_STRINGS)
        self._require(self.detokenize or not self.stop, "stop", "empty when detokenize is False")
        self._whole("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._whole("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        self._token_ids("stop_token_ids")
        if self.logit_bias is not None:
            few = not isinstance(self.logit_bias, dict) or len(self.logit_bias) <= MAX_TOKEN_LIST
            self._require(few, "logit_bias", f"a dict of at most {MAX_TOKEN_LIST} token ids")
            try:  # JSON has only strings for keys
                self.logit_bias = {int(token): float(bias) for token, bias in dict(self.logit_bias).items()}
            except (TypeError, ValueError):
                self._require(False, "logit_bias", "a dict of token ids and numbers")
            self._require(
                all(token >= 0 for token in self.logit_bias)
                and all(math.isfinite(bias) and -100 <= bias <= 100 for bias in self.logit_bias.values()),
                "logit_bias",
                "a dict of token ids and values within [-100, 100]",
            )
        if self.allowed_token_ids is not None:
            self._token_ids("allowed_token_ids", max_count=None)
            self._require(len(self.allowed_token_ids) > 0, "allowed_token_ids", "None or a non-empty list")
        self._strings("bad_words", MAX_TOKEN_LIST)
        words = self.bad_words_token_ids
        self._require(
            words is None
            or (isinstance(words, list) and len(words) <= MAX_TOKEN_LIST and all(_is_id_list(w) and w for w in words)),
            "bad_words_token_ids",
            f"None or at most {MAX_TOKEN_LIST} non-empty lists of token ids",
        )
        self._whole("truncate_prompt_tokens", 1, optional=True)
        if isinstance(self.structured_outputs, dict):
            try:
                self.structured_outputs = StructuredOutputsParams(**cast("dict[str, Any]", self.structured_outputs))
            except TypeError as error:  # a name that it does not have
                raise RequestError(f"structured_outputs: {error}.", param="structured_outputs") from None
        self._require(
            self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputsParams),
            "structured_outputs",
            "None or StructuredOutputsParams",
        )
        self._require(
            self.structured_outputs is None or self.min_tokens == 0, "min_tokens", "0 with structured_outputs"
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def clone(self) -> Self:
        """A copy that can be changed without changing this one."""
        return copy.deepcopy(self)

    def _whole(self, name: str, low: int, high: int = _MAX_WHOLE, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if not ((isinstance(value, int) and low <= value <= high) or (optional and value is None)):
            span = f"at least {low}" if high == _MAX_WHOLE else f"between {low} and {high}"
            self._require(False, name, f"a whole number {span}" + ", or None" * optional)

    def _finite(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not (isinstance(value, (int, float)) and low <= value <= high):  # which NaN is not
            self._require(False, name, f"a number between {low:g} and {high:g}")

    def _strings(self, name: str, max_count: int) -> None:
        items = cast("list[str]", getattr(self, name))
        if items == []:
            return
        ok = isinstance(items, list) and len(items) <= max_count and all(isinstance(s, str) and s for s in items)
        self._require(ok, name, f"at most {max_count} non-empty strings")
        self._require(sum(map(len, items)) <= MAX_WORDS_CHARS, name, f"at most {MAX_WORDS_CHARS} characters together")
        if any("\ud800" <= char <= "\udfff" for item in items for char in item):
            self._require(False, name, "valid Unicode, without halves of surrogate pairs")

    def _token_ids(self, name: str, max_count: int | None = MAX_TOKEN_LIST) -> None:
        items = getattr(self, name)
        ok = _is_id_list(items) and (max_count is None or len(items) <= max_count)
        self._require(ok, name, "a list of token ids")

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise RequestError(f"{name} is {getattr(self, name)!r:.200}; it must be {expected}.", param=name)


def _is_id_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and i >= 0 for i in cast("list[object]", value))


class PoolingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="pooling"):
    """How to turn hidden states into numbers, where no text is generated.

    Attributes:
        task: "embed" is the last token's vector, "token_embed" every token's; "pick" weighs ``choices`` against one
            another. The others need a head that no served architecture has.
        dimensions: cut the vectors to this length before normalising (Matryoshka models only).
        normalize: L2-normalise the vectors.
        choices: the answers to weigh, for "pick".
        targets: (position, token ids) pairs by position: whose log-probabilities are told behind which position of the
            prompt. The input processor fills it in.
    """

    task: PoolingTask = "embed"
    dimensions: int | None = None
    normalize: bool = True
    choices: list[str] = []
    targets: list[tuple[int, list[int]]] = []

    def __post_init__(self) -> None:
        if self.dimensions is not None and not (isinstance(self.dimensions, int) and 1 <= self.dimensions < 2**31):
            raise RequestError(
                f"dimensions is {self.dimensions!r}; it must be a whole number at least 1, or None.", param="dimensions"
            )
        if self.task == "pick":
            self._check_choices()
        elif self.choices:
            raise RequestError(f"choices go with the task 'pick', not with {self.task!r}.", param="choices")

    def _check_choices(self) -> None:
        choices: object = self.choices
        if not isinstance(choices, list | tuple):
            raise RequestError(f"choices must be a list of texts, got {type(choices).__name__}.", param="choices")
        wrong = [choice for choice in choices if not isinstance(choice, str) or not choice.strip()]
        if wrong:
            raise RequestError(
                f"choices must be texts, none of them empty; got {wrong[0]!r}"
                + ("." if isinstance(wrong[0], str) else f", write {str(wrong[0])!r}."),
                param="choices",
            )
        if not 2 <= len(self.choices) <= MAX_CHOICES:
            raise RequestError(
                f"choices has {len(self.choices)} entries; give between 2 and {MAX_CHOICES}.", param="choices"
            )
        twice = next((choice for choice in self.choices if self.choices.count(choice) > 1), None)
        if twice is not None:
            raise RequestError(f"choices holds {twice!r} more than once; they must differ.", param="choices")


class BeamSearchParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Beam search over ``beam_width`` hypotheses; scores are divided by length ** ``length_penalty``."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        # Each step looks at the 2 * beam_width likeliest tokens of every beam.
        widest = MAX_LOGPROBS // 2
        if not (isinstance(self.beam_width, int) and 1 <= self.beam_width <= widest):
            raise RequestError(
                f"beam_width is {self.beam_width!r}; it must be between 1 and {widest}.", param="beam_width"
            )
        if not (isinstance(self.max_tokens, int) and self.max_tokens >= 1):
            raise RequestError(f"max_tokens is {self.max_tokens!r}; it must be at least 1.", param="max_tokens")
        if not (isinstance(self.length_penalty, int | float) and math.isfinite(self.length_penalty)):
            raise RequestError(
                f"length_penalty is {self.length_penalty!r}; it must be a finite number.", param="length_penalty"
            )
