"""Tiny random Gemma 3 checkpoints in Hugging Face layout, drawn as LLaVA's are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.factories.gemma import build_gemma_tokenizer, redraw_gemma_weights
from tests.factory import VOCAB_SIZE, load_processor, write_generation_config

EDGE, PATCH_SIZE = 32, 8
IMAGE = "<start_of_image>"
_SIGNS = {"boi_token": IMAGE, "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Shape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        num_kv_heads: of 4 heads of 24 values.
        num_features: of a picture, whose tower makes 16 patches.
        layer_types: S for a layer with a window of ``window`` positions, F for one that sees everything.
        text_extra: more keys of the text config.
    """

    num_kv_heads: int = 2
    num_features: int = 4
    layer_types: str = "SF"
    window: int = 12
    tied: bool = True
    text_extra: tuple[tuple[str, Any], ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0


def write_gemma3(folder: Path, shape: Gemma3Shape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = build_gemma_tokenizer(_SIGNS, image=IMAGE)
    tokenizer.save_pretrained(folder)
    build_gemma3(shape, tokenizer).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    pictures = Gemma3ImageProcessorPil(size={"height": EDGE, "width": EDGE})
    Gemma3Processor(pictures, tokenizer, image_seq_length=shape.num_features).save_pretrained(folder)
    return folder


def build_gemma3(shape: Gemma3Shape, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The transformers model, in eval mode."""
    kinds = {"S": "sliding_attention", "F": "full_attention"}
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": len(shape.layer_types),
        "layer_types": [kinds[letter] for letter in shape.layer_types],
        "sliding_window": shape.window,
        "num_attention_heads": 4,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
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
        image_size=EDGE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    ids: dict[str, Any] = {
        name.replace("token", "token_index"): tokenizer.vocab[token] for name, token in _SIGNS.items()
    }
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text),
        vision_config=vision,
        mm_tokens_per_image=shape.num_features,
        tie_word_embeddings=shape.tied,
        **ids,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    redraw_gemma_weights(model, shape.seed)
    return model.to(getattr(torch, shape.dtype))


def hf_inputs(folder: Path, text: str, images: Sequence[Image.Image] = (), **options: Any) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt, with ``options`` for the pictures."""
    processor = load_processor(Gemma3Processor, folder)
    return dict(processor(text=[text], images=[list(images)] if images else None, return_tensors="pt", **options))
