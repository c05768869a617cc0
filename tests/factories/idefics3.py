"""Tiny random Idefics3 and SmolVLM checkpoints in Hugging Face layout, drawn as ``tests.factory`` draws LLaVA's.

``hf_inputs`` prepares a prompt as transformers' processors do. SmolVLM's wants a video processor and with it
torchvision, so its parts are called one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor, get_image_prompt_string
from transformers.video_utils import VideoMetadata

from opsin.models.numerals import in_words
from tests.factory import VOCAB_SIZE, redraw_weights, write_chatml_tokenizer, write_generation_config

IMAGE, VIDEO, FAKE, GLOBAL = "<image>", "<video>", "<fake_token_around_image>", "<global-img>"
_TAGS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
_SIGNS = (FAKE, IMAGE, "<end_of_utterance>", GLOBAL, VIDEO, *_TAGS)
_MODELS = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Idefics3Shape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        num_kv_heads: of 4 heads of 16 values.
        edge: of a tile, in pixels.
        longest_edge: of the picture that is tiled.
        scale_factor: edge of the block of patches that becomes one feature.
    """

    version: Literal["idefics3", "smolvlm"] = "idefics3"
    num_kv_heads: int = 2
    num_layers: int = 2
    tied: bool = False
    edge: int = 32
    patch_size: int = 8
    longest_edge: int = 96
    scale_factor: int = 2
    text_extra: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @property
    def num_features(self) -> int:
        """Of a tile."""
        return (self.edge // self.patch_size // self.scale_factor) ** 2


def write_idefics3(folder: Path, shape: Idefics3Shape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = write_chatml_tokenizer(folder, _SIGNS, IMAGE)
    build_idefics3(shape, tokenizer).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    build_image_processor(shape).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": shape.num_features}))
    return folder


def build_idefics3(shape: Idefics3Shape, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The transformers model, in eval mode."""
    text = {
        "model_type": "llama",
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
        "image_size": shape.edge,
        "patch_size": shape.patch_size,
    }
    config_class, model_class, _ = _MODELS[shape.version]
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.vocab[IMAGE],
        scale_factor=shape.scale_factor,
        tie_word_embeddings=shape.tied,
    )
    model = model_class(config).eval()
    redraw_weights(model, shape.seed)
    return model


def build_image_processor(shape: Idefics3Shape, **settings: Any) -> Any:
    """transformers' picture processor; ``settings`` are laid over its own."""
    sizes = {"size": {"longest_edge": shape.longest_edge}, "max_image_size": {"longest_edge": shape.edge}}
    return _MODELS[shape.version][2](**sizes | settings)


def picture_text(version: str, made: dict[str, Any], index: int, num_features: int) -> str:
    """What transformers' processor writes for a picture."""
    if version == "smolvlm":
        rows, cols = made["rows"][0][index], made["cols"][0][index]
        return get_image_prompt_string(rows, cols, num_features, FAKE, IMAGE, GLOBAL)
    processor: Any = Idefics3Processor.__new__(Idefics3Processor)
    processor.fake_image_token, processor.image_token, processor.global_image_tag = FAKE, IMAGE, GLOBAL
    processor.image_seq_len = num_features
    return processor.replace_image_token(made, index)


def video_text(metadata: Mapping[str, Any], num_frames: int, num_features: int) -> str:
    """What transformers' processor writes for a video.

    Args:
        metadata: fps, duration and frames_indices, as its loaders tell them.
    """
    processor: Any = SmolVLMProcessor.__new__(SmolVLMProcessor)
    processor.image_token, processor.fake_image_token, processor.global_image_token = IMAGE, FAKE, GLOBAL
    processor.image_seq_len = num_features
    told = VideoMetadata(total_num_frames=num_frames, **metadata)
    with patch.object(processing_smolvlm, "num2words", in_words):  # the package may be absent
        return processor.replace_video_token({"pixel_values": torch.empty(1, num_frames), "video_metadata": [told]}, 0)


def hf_inputs(
    folder: Path,
    text: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
    metadata: Sequence[Mapping[str, Any]] = (),
    **options: Any,
) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt, with ``options`` for the pictures.

    Its video processor needs torchvision, so frames go through the picture processor, which makes the same of a picture
    that it does not split.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    num_features: int = json.loads((folder / "processor_config.json").read_text())["image_seq_len"]
    pictures: Any = _MODELS[config["model_type"]][2].from_pretrained(folder)
    unknown = {"fps": None, "duration": None}
    told = iter(metadata or [unknown | {"frames_indices": list(range(len(video)))} for video in videos])
    stills, moving = iter(images), iter(videos)
    pixels: list[torch.Tensor] = []
    pieces: list[str] = []
    for piece in re.split(f"({IMAGE}|{VIDEO})", text):
        if piece == IMAGE:
            made = pictures([[next(stills)]], return_row_col_info=True, return_tensors="pt", **options)
            piece = picture_text(config["model_type"], made, 0, num_features)
            pixels.append(made["pixel_values"])
        elif piece == VIDEO:
            frames = list(next(moving))
            made = pictures([frames], return_tensors="pt", do_image_splitting=False)
            piece = video_text(next(told), len(frames), num_features)
            pixels.append(made["pixel_values"])
        pieces.append(piece)
    assert next(stills, None) is None
    assert next(moving, None) is None
    inputs: dict[str, Any] = {"pixel_values": torch.cat(pixels, dim=1)} if pixels else {}
    return inputs | dict(tokenizer("".join(pieces), return_tensors="pt", return_token_type_ids=False))
