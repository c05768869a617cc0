"""Structured outputs: which tokens may come next, for answers that must be JSON, match a pattern, or be one of a few.

llguidance (an extra) does the parsing: it walks the tokens as a trie against the grammar, so that the mask of a step
takes microseconds to a few milliseconds, and it bounds a step's work by counting, so that no grammar can hold the
engine up once it is compiled. Compiling has no such bound: what comes from afar is compiled by ``GrammarProber`` first.
Masks are made when a token is committed, while the device runs the next step.
"""

# llguidance is not typed.
# pyright: basic

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from opsin.errors import RequestError
from opsin.params import StructuredOutputsParams, Thinking

if TYPE_CHECKING:
    from opsin.processing.tokenizer import Tokenizer

_MAX_COMPILED = 64
_MAX_DEPTH = 100
_WHITESPACE = r"( |\n {0,12})?"  # a weak model may otherwise write white space without end


class Grammar:
    """Where one answer stands in its grammar.

    Attributes:
        mask: bit ``i`` (little-endian, padded to whole 32-bit words) says whether token ``i`` may come next; None when
            the answer is complete and can only end.
        error: why the last token was not accepted.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.error: str | None = None
        self.mask: bytes | None = self._next_mask()

    @property
    def is_complete(self) -> bool:
        """The answer can only end."""
        return self.mask is None

    def accept(self, token_id: int) -> bool:
        """Take in the next token; False, with ``error``, when the answer cannot go on from here."""
        allowed = self.mask is not None and self.mask[token_id // 8] >> token_id % 8 & 1
        if not self._matcher.consume_token(token_id):
            self.error = (
                self._failure()
                if allowed
                else "No token that the model may choose fits structured_outputs here; look at the other parameters."
            )
            return False
        self.mask = self._next_mask()
        return self.error is None

    def _next_mask(self) -> bytes | None:
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return None
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self.error = self._failure()
        return mask

    def _failure(self) -> str:
        return f"structured_outputs cannot be followed any further: {_first_line(self._matcher.get_error())}."


class GrammarBehindThinking:
    """A grammar that holds from where the model has thought; until then anything may come.

    Where the prompt has not begun the thinking, the model may begin it with its first token, or answer at once.

    Attributes:
        mask: as ``Grammar.mask``, but None also while the model thinks.
    """

    def __init__(self, grammar: Grammar, thinking: Thinking) -> None:
        self._grammar = grammar
        self._thinking = thinking
        self._has_begun = thinking.is_open
        self._is_over = False
        self.mask: bytes | None = None if self._has_begun else _with_bit(grammar.mask, thinking.opens)

    @property
    def error(self) -> str | None:
        """Why the last token was not accepted."""
        return self._grammar.error

    @property
    def is_complete(self) -> bool:
        """The answer can only end."""
        return self._grammar.is_complete

    def accept(self, token_id: int) -> bool:
        """Take in the next token; False, with ``error``, when the answer cannot go on from here."""
        if self._is_over:
            accepted = self._grammar.accept(token_id)
        elif self._has_begun:
            self._is_over = token_id == self._thinking.closes
            accepted = True
        else:
            self._has_begun = token_id == self._thinking.opens
            self._is_over = not self._has_begun
            accepted = self._has_begun or self._grammar.accept(token_id)
        self.mask = self._grammar.mask if self._is_over else None
        return accepted


def _with_bit(mask: bytes | None, token_id: int) -> bytes | None:
    """A mask that allows one token more."""
    if mask is None:
        return None
    wider = bytearray(mask)
    wider[token_id // 8] |= 1 << token_id % 8
    return bytes(wider)


class GrammarCheck(Protocol):
    """Says whether a constraint can be followed. Any thread may call it."""

    def check(self, params: StructuredOutputsParams) -> None:
        """See that it can be followed.

        Raises:
            RequestError: it is malformed or too large, uses what llguidance lacks, or llguidance is not installed.
        """
        ...

    def is_known(self, params: StructuredOutputsParams) -> bool:
        """``check`` would answer at once."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


class GrammarCompiler:
    """Makes the grammars of one model's requests, and is their ``GrammarCheck`` where nobody need be feared.

    Any thread may call it. llguidance lets other threads run while it compiles, however long that takes.

    Args:
        vocab_size: of the logits, which may be wider than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: dict[bytes, Any] = {}  # the one used last is the last

    def compile(self, params: StructuredOutputsParams) -> Grammar | GrammarBehindThinking:
        """A grammar at its start.

        Raises:
            RequestError: as ``check``.
        """
        key = key_of(params)
        with self._lock:
            matcher = self._compiled.pop(key, None)
            if matcher is not None:
                self._compiled[key] = matcher
        if matcher is None:
            matcher = compile_matcher(self._read_vocabulary(), params)
            with self._lock:
                self._compiled[key] = matcher
                if len(self._compiled) > _MAX_COMPILED:
                    del self._compiled[next(iter(self._compiled))]
        grammar = start(matcher)
        if params.thinking is None:
            return grammar
        if params.thinking.opens >= self._vocab_size:
            raise RequestError(
                f"structured_outputs has thinking that opens with the token {params.thinking.opens}; the model has "
                f"{self._vocab_size} tokens.",
                param="structured_outputs",
            )
        return GrammarBehindThinking(grammar, params.thinking)

    def check(self, params: StructuredOutputsParams) -> None:
        self.compile(params)

    def is_known(self, params: StructuredOutputsParams) -> bool:
        return key_of(params) in self._compiled

    def close(self) -> None:
        with self._lock:
            self._compiled.clear()

    def _read_vocabulary(self) -> Any:
        with self._lock:
            if self._vocabulary is None:
                ends = self._tokenizer.eos_token_ids
                self._vocabulary = read_vocabulary(self._tokenizer.to_json(), self._vocab_size, ends)
            return self._vocabulary


def key_of(params: StructuredOutputsParams) -> bytes:
    """Names a constraint: equal ones alike, others differently. What may come before the answer is no part of it."""
    constraint = params if params.thinking is None else msgspec.structs.replace(params, thinking=None)
    return hashlib.sha256(msgspec.msgpack.encode(constraint)).digest()


def read_vocabulary(tokenizer_json: str, vocab_size: int, eos_token_ids: Iterable[int]) -> Any:
    """What ``compile_matcher`` needs of a model; takes about a second for 150,000 tokens.

    Raises:
        RequestError: llguidance is not installed.
    """
    return _import().LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)


def compile_matcher(vocabulary: Any, params: StructuredOutputsParams) -> Any:
    """Compile a constraint. There are small ones that take hours: integers that are multiples of a large prime, say.

    Raises:
        RequestError: as ``GrammarCheck.check``.
    """
    matcher = _import().LLMatcher(vocabulary, _grammar_text(params), log_level=0)
    if matcher.is_error():
        reason = _first_line(matcher.get_error())
        raise RequestError(f"structured_outputs is not usable: {reason}.", param="structured_outputs")
    return matcher


def start(matcher: Any) -> Grammar:
    """The grammar of one answer, from what was compiled for all that want the same.

    Raises:
        RequestError: there is no first token.
    """
    grammar = Grammar(matcher.deep_copy())
    if grammar.error is not None:
        raise RequestError(grammar.error, param="structured_outputs")
    return grammar


def _grammar_text(params: StructuredOutputsParams) -> str:
    llguidance = _import()
    if params.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # As one terminal: the alternatives of a rule are bounded, those of a terminal are not.
        return llguidance.LLMatcher.grammar_from_lark(
            "start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, params.choice))
        )
    if params.grammar is not None:
        try:
            return llguidance.grammar_from("grammar", params.grammar)
        except ValueError as error:
            raise RequestError(
                f"structured_outputs has an unreadable grammar: {error}", param="structured_outputs"
            ) from None
    schema = '{"type": "object"}' if params.json is None else json.dumps(_closed(_read_schema(params.json)))
    spacing = {"whitespace_pattern": params.whitespace_pattern or _WHITESPACE}
    if params.disable_any_whitespace:
        spacing = {"whitespace_flexible": False}
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=spacing)


def _read_schema(schema: str | dict[str, Any]) -> Any:
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        _depth(parsed)
    except (ValueError, RecursionError):
        parsed = None
    if parsed is True:
        return {}
    if not isinstance(parsed, dict):
        raise RequestError("structured_outputs has a json that is not a JSON schema.", param="structured_outputs")
    return parsed


def _depth(value: Any, left: int = _MAX_DEPTH) -> None:
    """``ValueError`` where it is nested too deeply to be walked."""
    if left == 0:
        raise ValueError
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _depth(inner, left - 1)


def _closed(schema: Any) -> Any:
    """Objects that list their properties, and do not speak of others, take no others.

    JSON Schema would let them; but a model that may invent properties goes on inventing them, and other engines'
    grammars are closed as well. Parts of an ``allOf`` stay open, since each lists only some.
    """
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in ("properties", "$defs", "definitions", "patternProperties"):
        if isinstance(closed.get(key), dict):
            closed[key] = {name: _closed(inner) for name, inner in closed[key].items()}
    for key in ("items", "additionalProperties"):
        if key in closed:
            closed[key] = _closed(closed[key])
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(closed.get(key), list):
            closed[key] = [_closed(inner) for inner in closed[key]]
    speaks = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "$ref"}
    if "properties" in closed and not speaks & closed.keys():
        closed["additionalProperties"] = False
    return closed


def _quoted(word: str) -> str:
    """A Lark string; it spells escapes as JSON does."""
    return json.dumps(word, ensure_ascii=False)


def _first_line(message: str) -> str:
    """What a message of many lines says; of a regex that cannot be read, its last lines say why."""
    first, *rest = message.strip().split("\n")
    why = next((line.removeprefix("error: ") for line in rest if line.startswith("error: ")), "")
    return f"{first} {why}".rstrip(". ")


def _import() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RequestError(
            'structured_outputs needs llguidance, which is not installed here: pip install "opsin[structured]".',
            param="structured_outputs",
        ) from None
    return llguidance
