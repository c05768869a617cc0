"""Tiny random PaliGemma and PaliGemma 2 checkpoints in Hugging Face layout, drawn as LLaVA's are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from tests.factories.gemma import build_gemma_tokenizer, redraw_gemma_weights
from tests.factory import VOCAB_SIZE, load_processor, write_generation_config

PATCH_SIZE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PaliGemmaShape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        text: the language model's type.
        num_kv_heads: of 4 heads of 24 values.
        image_size: edge of the tower's square, in pixels of which a patch takes 8 x 8.
        text_extra: more keys of the text config.
        adds_bos: the tokenizer begins every text with <bos>, as PaliGemma's does, and PaliGemma 2's does not.
    """

    text: Literal["gemma", "gemma2"] = "gemma"
    num_kv_heads: int = 1
    num_layers: int = 2
    tied: bool = True
    image_size: int = 32
    text_extra: tuple[tuple[str, Any], ...] = ()
    adds_bos: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0


def write_paligemma(folder: Path, shape: PaliGemmaShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = build_gemma_tokenizer({"image_token": "<image>"}, image="<image>", adds_bos=shape.adds_bos)
    tokenizer.save_pretrained(folder)
    build_paligemma(shape, tokenizer).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    edge = shape.image_size
    pictures: Any = SiglipImageProcessorPil(size={"height": edge, "width": edge})
    pictures.image_seq_length = (edge // PATCH_SIZE) ** 2
    pictures.save_pretrained(folder)
    return folder


def build_paligemma(shape: PaliGemmaShape, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The transformers model, in eval mode."""
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": 24,
        "max_position_embeddings": 512,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **dict(shape.text_extra),
    }
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=shape.image_size,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        text_config={"gemma": GemmaConfig, "gemma2": Gemma2Config}[shape.text](**text),
        vision_config=vision,
        image_token_index=tokenizer.vocab["<image>"],
        projection_dim=64,
        tie_word_embeddings=shape.tied,
    )
    model = PaliGemmaForConditionalGeneration(config).eval()
    redraw_gemma_weights(model, shape.seed)
    return model.to(getattr(torch, shape.dtype))


def hf_inputs(folder: Path, text: str, images: Sequence[Image.Image] = (), **options: Any) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt, with ``options`` for the pictures.

    It refuses prompts without pictures; they are written here as it writes the others.
    """
    processor = load_processor(PaliGemmaProcessor, folder)
    if images:
        with warnings.catch_warnings():  # of NumPy, which the processor hands tensors
            warnings.simplefilter("ignore", DeprecationWarning)
            inputs = dict(processor(text=[text], images=[list(images)], return_tensors="pt", **options))
        del inputs["labels"]
        return inputs
    tokenizer = processor.tokenizer
    inputs = dict(tokenizer(f"<bos>{text}\n", add_special_tokens=False, return_tensors="pt"))
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs
