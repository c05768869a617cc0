"""Tiny random LLaVA-NeXT checkpoints in Hugging Face layout: ``tests.factory``'s LLaVA, with tiles and a newline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.factory import CHAT_TEMPLATE, LlavaShape, build_llava, build_tokenizer, redraw_weights

TILE = 32
PINPOINTS = ((TILE, 2 * TILE), (2 * TILE, TILE), (2 * TILE, 2 * TILE), (3 * TILE, TILE), (TILE, 3 * TILE))


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaNextShape(LlavaShape):
    """Attributes:
    module_names: tensors are named after transformers 5's modules, ``model.image_newline``, not as on the hub.
    """

    module_names: bool = False


def write_llava_next(folder: Path, shape: LlavaNextShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    model = build_llava_next(shape)
    model.save_pretrained(folder)
    if shape.module_names:
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        assert weights.keys() != load_file(folder / "model.safetensors").keys()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    GenerationConfig(bos_token_id=ids[0], eos_token_id=ids[1], pad_token_id=ids[2]).save_pretrained(folder)
    build_processor(shape).save_pretrained(folder)
    return folder


def build_llava_next(shape: LlavaNextShape) -> Any:
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


def build_processor(shape: LlavaNextShape, **settings: Any) -> Any:
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


def hf_inputs(folder: Path, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt."""
    processor: Any = LlavaNextProcessor.from_pretrained(folder)
    return dict(processor(text=text, images=images or None, return_tensors="pt"))
