"""Tiny random Mistral 3 and Pixtral checkpoints in Hugging Face layout, drawn as ``tests.factory`` draws LLaVA's.

``hf_inputs`` prepares a prompt as transformers' ``PixtralProcessor`` does. That class itself wants torchvision, so its
picture processor is called alone, with the patch size that it would hand on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tests.factory import VOCAB_SIZE, redraw_weights, write_chatml_tokenizer, write_generation_config

PATCH_SIZE = 8
IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistral3Shape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        version: 'pixtral' is a LLaVA, and merges no patches.
        num_kv_heads: of 4 heads of ``head_dim`` values.
        merge: edge of the block of patches that becomes one feature.
        longest_edge: of the largest picture, in pixels.
    """

    version: Literal["mistral3", "pixtral"] = "mistral3"
    num_kv_heads: int = 2
    num_layers: int = 2
    head_dim: int = 16
    tied: bool = False
    window: int | None = None
    merge: int = 2
    longest_edge: int = 96
    feature_layer: int | tuple[int, ...] = -1
    projector_bias: bool = False
    vision_extra: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @property
    def unit(self) -> int:
        """Edge of a feature, in pixels."""
        return PATCH_SIZE * (self.merge if self.version == "mistral3" else 1)


def write_mistral3(folder: Path, shape: Mistral3Shape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = write_chatml_tokenizer(folder, (IMAGE, BREAK, END), IMAGE)
    build_mistral3(shape, tokenizer).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    build_image_processor(size={"longest_edge": shape.longest_edge}).save_pretrained(folder)
    joint = {
        "processor_class": "PixtralProcessor",
        "image_token": IMAGE,
        "image_break_token": BREAK,
        "image_end_token": END,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": shape.unit // PATCH_SIZE,
    }
    (folder / "processor_config.json").write_text(json.dumps(joint))
    return folder


def build_mistral3(shape: Mistral3Shape, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The transformers model, in eval mode."""
    text = {
        "model_type": "mistral",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 512,
        "sliding_window": shape.window,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": shape.longest_edge,
        "patch_size": PATCH_SIZE,
        **dict(shape.vision_extra),
    }
    common: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": tokenizer.vocab[IMAGE],
        "vision_feature_layer": shape.feature_layer
        if isinstance(shape.feature_layer, int)
        else list(shape.feature_layer),
        "multimodal_projector_bias": shape.projector_bias,
        "tie_word_embeddings": shape.tied,
    }
    if shape.version == "mistral3":
        model: Any = Mistral3ForConditionalGeneration(Mistral3Config(**common, spatial_merge_size=shape.merge))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**common, vision_feature_select_strategy="full"))
    model = model.eval()
    redraw_weights(model, shape.seed)
    with torch.no_grad():
        model.model.vision_tower.ln_pre.weight.add_(1.0)
    return model


def build_image_processor(**settings: Any) -> Any:
    """transformers' picture processor; ``settings`` are laid over its own."""
    return PixtralImageProcessorPil(**{"size": {"longest_edge": 96}, "patch_size": PATCH_SIZE} | settings)


def picture_text(size: Sequence[int], unit: int) -> str:
    """What transformers' processor writes for a picture that was made (height, width) pixels large."""
    rows, cols = (side // unit for side in size)
    return BREAK.join([IMAGE * cols] * rows) + END


def hf_inputs(folder: Path, text: str, images: Sequence[Image.Image] = (), **options: Any) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt, with ``options`` for the pictures."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs: dict[str, Any] = {}
    if images:
        joint: dict[str, Any] = json.loads((folder / "processor_config.json").read_text())
        unit = joint["patch_size"] * joint["spatial_merge_size"]
        pictures: Any = PixtralImageProcessorPil.from_pretrained(folder)
        inputs = dict(pictures(list(images), return_tensors="pt", patch_size=unit, **options))
        pieces = text.split(IMAGE)
        assert len(pieces) == len(images) + 1
        text = pieces[0]
        for size, piece in zip(inputs["image_sizes"].tolist(), pieces[1:], strict=True):
            text += picture_text(size, unit) + piece
    return inputs | dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))
