"""Small tokenizers of the kinds that differ in their handling of spaces and bytes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from opsin.processing.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
KINDS = ("byte-level", "sentencepiece-always", "sentencepiece-first")
_TEXT = [
    "USER: What is in the picture? ASSISTANT: A red circle, and two blue squares.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times; and again: the fox jumps.",
    "Grüße aus Köln, 你好世界.",
] * 3


@cache
def huggingface(kind: str) -> PreTrainedTokenizerFast:
    """A transformers tokenizer that puts <s> first, as Llama's does."""
    rust = _byte_level() if kind == "byte-level" else _sentencepiece(first_only=kind.endswith("first"))
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", rust.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(huggingface(kind))


def _byte_level() -> RustTokenizer:
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(_TEXT, trainer)
    return rust


def _sentencepiece(*, first_only: bool) -> RustTokenizer:
    """BPE over "▁" with byte fallback, in the old form (every stretch of text begins with a space) and the new one."""
    learner = RustTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learned: dict[str, Any] = json.loads(learner.to_str())["model"]
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(dict.fromkeys(words))},
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    rust = RustTokenizer(model)
    if first_only:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rust.add_special_tokens(SPECIAL)
    return rust
