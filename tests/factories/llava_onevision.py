"""Tiny random LLaVA-OneVision checkpoints in Hugging Face layout: ``tests.factory``'s LLaVA with SigLIP, tiles, a
newline and a limit on the mosaic.

``hf_inputs`` prepares a prompt as transformers' processor does. That class itself wants a video processor and with it
torchvision, so its parts are called one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.factory import LlavaShape, build_llava, redraw_weights, write_chatml_tokenizer, write_generation_config

TILE = 32
PATCH_SIZE = 8
IMAGE = "<image>"
VIDEO = "<video>"
PINPOINTS = [[TILE * rows, TILE * cols] for rows in range(1, 4) for cols in range(1, 4)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnevisionShape(LlavaShape):
    """``max_tiles``: mosaics of more are shrunk."""

    text: Literal["llama", "mistral", "qwen2"] = "qwen2"
    tower: Literal["clip", "siglip"] = "siglip"
    num_kv_heads: int = 2
    feature_layer: int | tuple[int, ...] = -1
    strategy: Literal["default", "full"] = "full"
    max_tiles: int = 3

    @property
    def vision_aspect_ratio(self) -> str:
        return f"anyres_max_{self.max_tiles}"


def write_llava_onevision(folder: Path, shape: OnevisionShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = write_chatml_tokenizer(folder, (IMAGE, VIDEO), IMAGE + "\n")
    build_llava_onevision(shape, tokenizer).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    build_image_processor().save_pretrained(folder)
    joint = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": IMAGE,
        "video_token": VIDEO,
        "num_image_tokens": shape.num_features,
        "vision_aspect_ratio": shape.vision_aspect_ratio,
        "vision_feature_select_strategy": shape.strategy,
    }
    (folder / "processor_config.json").write_text(json.dumps(joint))
    return folder


def build_llava_onevision(shape: OnevisionShape, tokenizer: Any) -> Any:
    """The transformers model, in eval mode."""
    config = build_llava(shape, tokenizer).config
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=tokenizer.vocab[IMAGE],
            video_token_index=tokenizer.vocab[VIDEO],
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=shape.strategy,
            vision_aspect_ratio=shape.vision_aspect_ratio,
            tie_word_embeddings=shape.tied,
            image_grid_pinpoints=PINPOINTS,
        )
    ).eval()
    redraw_weights(model, shape.seed)
    return model


def build_image_processor(**settings: Any) -> Any:
    """transformers' picture processor; ``settings`` are laid over its own."""
    return LlavaOnevisionImageProcessorPil(
        **{"size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": PINPOINTS} | settings
    )


def build_processor(image_processor: Any, *, num_image_tokens: int, vision_aspect_ratio: str) -> Any:
    """As much of transformers' processor as counts and writes a picture's tokens."""
    processor: Any = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = image_processor
    processor.image_token, processor.video_token = IMAGE, VIDEO
    processor.num_image_tokens = num_image_tokens
    processor.vision_feature_select_strategy = "full"
    processor.vision_aspect_ratio = vision_aspect_ratio
    return processor


def hf_inputs(
    folder: Path,
    text: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
    **options: Any,
) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt, with ``options`` for the pictures.

    Its video processor needs torchvision, so frames go through the picture processor one by one, which makes the same
    square of each first of all. Videos of one prompt have equally many frames, as its model wants.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures: Any = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    config: Any = LlavaOnevisionConfig.from_pretrained(folder)
    grid = config.vision_config.image_size // config.vision_config.patch_size
    processor = build_processor(pictures, num_image_tokens=grid**2, vision_aspect_ratio=config.vision_aspect_ratio)
    inputs: dict[str, Any] = {}
    if images:
        inputs = dict(pictures(list(images), return_tensors="pt", **options))
    if videos:
        made = [
            torch.cat([pictures([frame], return_tensors="pt")["pixel_values"][:, 0] for frame in video])
            for video in videos
        ]
        inputs["pixel_values_videos"] = torch.stack(made)
    counts = {IMAGE: 0, VIDEO: 0}
    pieces: list[str] = []
    for piece in re.split(f"({IMAGE}|{VIDEO})", text):
        if piece in counts:
            counts[piece] += 1
            write = processor.replace_image_token if piece == IMAGE else processor.replace_video_token
            piece = write(inputs, counts[piece] - 1)
        pieces.append(piece)
    assert (counts[IMAGE], counts[VIDEO]) == (len(images), len(videos))
    return inputs | dict(tokenizer("".join(pieces), return_tensors="pt", return_token_type_ids=False))
