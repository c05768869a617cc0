"""The tokenizer: text to ids and back, special tokens recognised or deliberately not.

Wraps the fast tokenizer that transformers' ``AutoTokenizer`` builds for a folder, and talks to its Rust half directly.
"""

# transformers does not type what it loads.
# pyright: standard

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opsin.errors import UnsupportedModelError
from opsin.processing.kept_tokenizer import KeptTokenizer, open_tokenizer
from opsin.processing.neutral import ControlStrings, Rendered, Span

_LONG = 1024  # ids whose text takes longer to make than to ask for in a batch
_LONG_CHARS = 8192  # likewise


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in GPT-2's vocabulary: its own if that can be seen, or one from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


_BYTE_OF = _byte_letters()


class Tokenizer:
    """One model's tokenizer.

    Args:
        hf: a fast transformers tokenizer, or what was kept of one.
        generation_config: the checkpoint's generation_config.json, for its end tokens.

    Attributes:
        special_ids: tokens that ``decode`` leaves out by default.
        byte_ids: tokens that stand for one byte each, in vocabularies that fall back to bytes.
        is_byte_level: every token stands for bytes, ``token_bytes``, as in GPT-2's vocabulary.
        letter_id: a token that ends in plain text, to stand before another token.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, hf: Any, generation_config: Mapping[str, Any] | None = None) -> None:
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModelError(
                f"{type(hf).__name__} has no fast (Rust) half, which opsin needs. Put a tokenizer.json into the folder."
            )
        backend.no_padding()
        backend.no_truncation()
        self._hf = hf
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._added_ids = {token.content: i for i, token in self._added.items()}
        self._added_strings = ControlStrings(self._added_ids)
        self.special_ids: frozenset[int] = frozenset(i for i, token in self._added.items() if token.special)
        self.special_strings: tuple[str, ...] = tuple(t.content for t in self._added.values() if t.special)
        self.special_tokens_map: dict[str, Any] = dict(hf.special_tokens_map)
        self.chat_template: str | dict[str, str] | None = getattr(hf, "chat_template", None)
        self.bos_token: str | None = hf.bos_token
        self.eos_token_id: int | None = hf.eos_token_id
        self.eos_token_ids: frozenset[int] = _end_ids(hf.eos_token_id, generation_config)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._unk_id: int | None = hf.unk_token_id
        with_special, plain = self.encode("x"), self.encode("x", add_special_tokens=False)
        at = next((i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain), 0)
        self._prefix_ids, self._suffix_ids = with_special[:at], with_special[at + len(plain) :]
        self._newline_ids = self._pipeline("\n")
        self._text_starts_differ = self._starts_differ()
        self._piece_text: dict[int, str] = {}
        self._piece_bytes: dict[int, bytes] = {}
        self.is_byte_level: bool = type(backend.decoder).__name__ == "ByteLevel"
        byte_ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        falls_back = getattr(backend.model, "byte_fallback", False)
        self.byte_ids: frozenset[int] = frozenset(i for i in byte_ids if i is not None and falls_back)
        self.longest_piece: int = max(map(len, backend.get_vocab(with_added_tokens=True)))
        self.letter_id: int = self.encode("a", add_special_tokens=False)[-1]

    @classmethod
    def from_folder(
        cls, folder: str | Path, generation_config: Mapping[str, Any] | None = None, *, cache: Path | None = None
    ) -> Tokenizer:
        """Open the tokenizer of a checkpoint folder; nothing is downloaded and no code of the checkpoint is run.

        Args:
            cache: a folder where tokenizers are kept, so that the next start need not import transformers.
        """
        return cls(open_tokenizer(Path(folder), cache), generation_config)

    @property
    def hf(self) -> Any:
        """The transformers tokenizer."""
        if isinstance(self._hf, KeptTokenizer):
            self._hf = self._hf.reopen()
        return self._hf

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json."""
        return self._backend.to_str()

    # ------------------------------------------------------------------------------------------ text to ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids as transformers gives them: special tokens in the text are recognised."""
        if len(text) < _LONG_CHARS:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        # tokenizers lets other threads run only while it reads a batch, even of one text; but it wakes threads for it.
        return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_plain(self, text: str, *, at_start: bool = True) -> list[int]:
        """Token ids of ``text`` with no special or added token recognised in it.

        Args:
            at_start: the text begins the prompt. Some tokenizers put a space before the first word of a prompt only.
        """
        if at_start or not self._text_starts_differ:
            ids = self._pipeline(text)
        else:
            ids = self._pipeline("\n" + text)[len(self._newline_ids) :]
        forbidden = self.special_ids - {self._unk_id}
        if forbidden.isdisjoint(ids):
            return ids
        # The vocabulary itself holds a special token as a word (Unigram): no single character can be one.
        return [i for char in text for i in self._pipeline(char)]

    def encode_rendered(self, prompt: Rendered, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt in which some control strings are plain text (``prompt.plain``)."""
        if not prompt.plain:
            return self.encode(prompt.text, add_special_tokens=add_special_tokens)
        text = prompt.text
        ids = list(self._prefix_ids) if add_special_tokens else []
        trusted = _without(self._added_strings.find(text), prompt.plain)
        edges = [(0, 0), *trusted, (len(text), len(text))]
        done, plain_at = 0, 0
        for before, after in itertools.pairwise(edges):
            start, end = before[1], after[0]
            while plain_at < len(prompt.plain) and prompt.plain[plain_at][1] <= start:
                plain_at += 1
            if plain_at == len(prompt.plain) or prompt.plain[plain_at][0] >= end:
                continue  # nothing to neutralise between these two trusted tokens
            if done < start:
                ids += self.encode(text[done:start], add_special_tokens=False)
            ids += self.encode_plain(self._strip(text, before, after), at_start=start == 0)
            done = end
        if done < len(text):
            ids += self.encode(text[done:], add_special_tokens=False)
        return ids + self._suffix_ids if add_special_tokens else ids

    def encode_bad_words(self, words: Iterable[str]) -> list[list[int]]:
        """Id sequences that spell the words, at the start of a text and after a space."""
        sequences: list[list[int]] = []
        for word in words:
            bare = self.encode(word.lstrip(), add_special_tokens=False)
            spaced = self.encode(" " + word.lstrip(), add_special_tokens=False)
            sequences.append(bare)
            if spaced and bare and spaced[0] != bare[0] and len(spaced) == len(bare):
                sequences.append(spaced)
        return [s for s in sequences if s]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of one token, or None when the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    # ------------------------------------------------------------------------------------------ ids to text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids, as transformers' ``decode`` gives it (without cleaning up spaces)."""
        if len(ids) < _LONG:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]  # as for ``encode``

    def has_text(self, token_id: int) -> bool:
        """Whether the vocabulary has a word for this id; models often have more rows than tokens."""
        return bool(self._backend.id_to_token(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """What a token of a byte-level vocabulary stands for; nothing where there is no such token."""
        piece = self._piece_bytes.get(token_id)
        if piece is None:
            word = self._backend.id_to_token(token_id) or ""
            spelt = [_BYTE_OF.get(char) for char in word]
            # An added token may hold other letters, and is then itself.
            piece = word.encode() if None in spelt else bytes(byte for byte in spelt if byte is not None)
            self._piece_bytes[token_id] = piece
        return piece

    def token_text(self, token_id: int) -> str:
        """Text of one token as it reads inside a sentence: a leading space is kept."""
        text = self._piece_text.get(token_id)
        if text is None:
            anchor = self._newline_ids[-1:]
            pair = self._backend.decode([*anchor, token_id], skip_special_tokens=False)
            alone = self._backend.decode(anchor, skip_special_tokens=False)
            text = pair[len(alone) :] if pair.startswith(alone) else ""
            text = text or self._backend.decode([token_id], skip_special_tokens=False)
            self._piece_text[token_id] = text
        return text

    # ---------------------------------------------------------------------------------------------- inside

    def _pipeline(self, text: str) -> list[int]:
        """Normalise, pre-tokenise and tokenise, without the step that finds added tokens."""
        backend = self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    def _starts_differ(self) -> bool:
        """Whether text after a special token is tokenised unlike text at the start of a prompt."""
        probe = next((t for t in self._added.values() if t.special and not t.rstrip), None)
        if probe is None:
            return False
        after_special = self.encode(probe.content + "x", add_special_tokens=False)[1:]
        return after_special != self._pipeline("x")

    def _strip(self, text: str, before: Span, after: Span) -> str:
        """The text between two added tokens, less the blanks that they swallow."""
        piece = text[before[1] : after[0]]
        left = self._added_ids.get(text[before[0] : before[1]])
        right = self._added_ids.get(text[after[0] : after[1]])
        if left is not None and self._added[left].rstrip:
            piece = piece.lstrip()
        if right is not None and self._added[right].lstrip:
            piece = piece.rstrip()
        return piece


def _end_ids(eos_token_id: int | None, generation_config: Mapping[str, Any] | None) -> frozenset[int]:
    configured = (generation_config or {}).get("eos_token_id")
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    return frozenset(ids | ({eos_token_id} if eos_token_id is not None else set()))


def _without(spans: Sequence[Span], removed: Sequence[Span]) -> list[Span]:
    """The spans that overlap none of ``removed``; both sorted."""
    kept: list[Span] = []
    at = 0
    for start, end in spans:
        while at < len(removed) and removed[at][1] <= start:
            at += 1
        if at == len(removed) or removed[at][0] >= end:
            kept.append((start, end))
    return kept
