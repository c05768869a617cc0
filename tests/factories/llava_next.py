"""Tiny random LLaVA-NeXT checkpoints in Hugging Face layout: ``tests.factory``'s LLaVA, with tiles and a newline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.factory import (
    CHAT_TEMPLATE,
    LlavaShape,
    build_llava,
    build_tokenizer,
    load_processor,
    redraw_weights,
    write_generation_config,
)

TILE = 32
PINPOINTS = ((TILE, 2 * TILE), (2 * TILE, TILE), (2 * TILE, 2 * TILE), (3 * TILE, TILE), (TILE, 3 * TILE))


def write_llava_next(folder: Path, shape: LlavaShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_llava_next(shape).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    build_processor(shape).save_pretrained(folder)
    return folder


def build_llava_next(shape: LlavaShape) -> Any:
    """The transformers model, in eval mode."""
    config = build_llava(shape, build_tokenizer()).config
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=config.image_token_id,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=shape.strategy,
            tie_word_embeddings=shape.tied,
            image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
        )
    ).eval()
    redraw_weights(model, shape.seed)
    return model.to(getattr(torch, shape.dtype))


def build_processor(shape: LlavaShape, **settings: Any) -> Any:
    """transformers' processor; ``settings`` are laid over the picture processor's."""
    edge = shape.image_size
    common = {
        "size": {"shortest_edge": edge},
        "crop_size": {"height": edge, "width": edge},
        "image_grid_pinpoints": [list(pair) for pair in PINPOINTS],
    }
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(**common | settings),
        tokenizer=build_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy=shape.strategy,
        num_additional_image_tokens=int(shape.tower == "clip"),
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


def hf_inputs(folder: Path, text: str, images: Sequence[Image.Image] = (), **options: Any) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt, with ``options`` for the pictures."""
    processor = load_processor(LlavaNextProcessor, folder)
    return dict(processor(text=text, images=list(images) or None, return_tensors="pt", **options))
