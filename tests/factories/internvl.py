"""Tiny random InternVL checkpoints in Hugging Face layout, drawn as ``tests.factory`` draws LLaVA's.

``hf_inputs`` prepares a prompt as transformers' processor does. That class itself wants a video processor and with it
torchvision, so its parts are called one by one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.factory import VOCAB_SIZE, redraw_weights, write_chatml_tokenizer, write_generation_config

PATCH_SIZE = 8
IMAGE = "<IMG_CONTEXT>"
VIDEO = "<video>"
_SIGNS = ("<img>", "</img>", IMAGE, VIDEO)


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVLShape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        num_kv_heads: of 4 heads of 16 values.
        image_size: edge of a tile, in pixels of which a patch takes 8 x 8.
        max_patches: the most tiles of a picture, without the small one of the whole.
        vision_extra: more keys of the vision config.
    """

    text: Literal["qwen2", "llama"] = "qwen2"
    num_kv_heads: int = 2
    num_layers: int = 2
    tied: bool = False
    image_size: int = 32
    max_patches: int = 6
    downsample_ratio: float = 0.5
    feature_layer: int = -1
    vision_extra: tuple[tuple[str, Any], ...] = ()
    text_extra: tuple[tuple[str, Any], ...] = ()
    seed: int = 0


def write_internvl(folder: Path, shape: InternVLShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = write_chatml_tokenizer(folder, _SIGNS, IMAGE + "\n")
    build_internvl(shape, tokenizer).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    size = {"height": shape.image_size, "width": shape.image_size}
    GotOcr2ImageProcessorPil(size=size, max_patches=shape.max_patches).save_pretrained(folder)
    return folder


def build_internvl(shape: InternVLShape, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The transformers model, in eval mode."""
    text = {
        "model_type": shape.text,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **dict(shape.text_extra),
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": [shape.image_size] * 2,
        "patch_size": [PATCH_SIZE] * 2,
        **dict(shape.vision_extra),
    }
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.vocab[IMAGE],
        image_seq_length=int((shape.image_size / PATCH_SIZE * shape.downsample_ratio) ** 2),
        downsample_ratio=shape.downsample_ratio,
        vision_feature_layer=shape.feature_layer,
        tie_word_embeddings=shape.tied,
    )
    model = InternVLForConditionalGeneration(config).eval()
    redraw_weights(model, shape.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda_" in name:  # about 1, or the tower's blocks would hardly matter
                parameter.add_(1.0)
    return model


def hf_inputs(
    folder: Path,
    text: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
    **options: Any,
) -> dict[str, torch.Tensor]:
    """What transformers' ``InternVLProcessor`` makes of a prompt, with ``options`` for the pictures.

    Its video processor needs torchvision, so frames go through the picture processor one by one, uncut.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures: Any = GotOcr2ImageProcessorPil.from_pretrained(folder)  # its stubs refuse its own arguments
    config = InternVLConfig.from_pretrained(folder)
    processor: Any = SimpleNamespace(
        image_token=IMAGE,
        start_image_token="<img>",
        end_image_token="</img>",
        image_seq_length=config.image_seq_length,
    )
    options = {"crop_to_patches": True} | options  # as InternVLProcessor asks
    stills, moving = iter(images), iter(videos)
    pieces: list[str] = []
    pixels: list[torch.Tensor] = []
    for piece in re.split(f"({IMAGE}|{VIDEO})", text):
        if piece == IMAGE:
            made = pictures(next(stills), return_tensors="pt", **options)
            counts = {"num_patches": [int(count) for count in made["num_patches"]]}
            piece = InternVLProcessor.replace_image_token(processor, counts, 0)
            pixels.append(made["pixel_values"])
        elif piece == VIDEO:
            made = pictures(list(next(moving)), return_tensors="pt", crop_to_patches=False)
            piece = InternVLProcessor.replace_video_token(processor, {"pixel_values_videos": [made["pixel_values"]]}, 0)
            pixels.append(made["pixel_values"])
        pieces.append(piece)
    assert next(stills, None) is None
    assert next(moving, None) is None
    inputs: dict[str, Any] = {"pixel_values": torch.cat(pixels)} if pixels else {}
    return inputs | dict(tokenizer("".join(pieces), return_tensors="pt", return_token_type_ids=False))
