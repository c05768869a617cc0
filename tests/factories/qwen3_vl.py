"""Tiny random Qwen3-VL checkpoints in Hugging Face layout, drawn as LLaVA's are; prompts as in ``qwen2_vl``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from tests.factories import qwen2_vl
from tests.factories.qwen2_vl import IMAGE, PATCH_SIZE, SIGNS, TOKENS, UNIT, video_patches
from tests.factory import VOCAB_SIZE, redraw_weights, write_chatml_tokenizer, write_generation_config

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
VIDEO_BOUNDS = {"shortest_edge": 4 * UNIT**2, "longest_edge": 48 * UNIT**2}  # pixels of all frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VLShape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        num_kv_heads: of 4 heads of 16 values.
        max_pixels: 16 x 16 of them make a feature.
        deep_layers: layers of the tower, of three, whose outputs reach the decoder's first layers.
        position_edge: of the square of learned positions.
    """

    num_kv_heads: int = 2
    num_layers: int = 3
    tied: bool = False
    max_pixels: int = 40 * UNIT**2
    deep_layers: tuple[int, ...] = (0, 1)
    position_edge: int = 4
    text_extra: tuple[tuple[str, Any], ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0


def write_qwen3_vl(folder: Path, shape: Qwen3VLShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = write_chatml_tokenizer(folder, SIGNS, IMAGE)
    build_qwen3_vl(shape, tokenizer).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    size = {"shortest_edge": 4 * UNIT**2, "longest_edge": shape.max_pixels}
    pictures = Qwen2VLImageProcessorPil(size=size, patch_size=PATCH_SIZE)
    pictures.save_pretrained(folder)
    videos = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": VIDEO_BOUNDS,
        "patch_size": PATCH_SIZE,
        "image_mean": list(pictures.image_mean),
        "image_std": list(pictures.image_std),
        "do_sample_frames": False,
    }
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return folder


def build_qwen3_vl(shape: Qwen3VLShape, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The transformers model, in eval mode."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **dict(shape.text_extra),
    }
    vision = {
        "depth": 3,
        "num_heads": 2,
        "patch_size": PATCH_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": shape.position_edge**2,
        "deepstack_visual_indexes": list(shape.deep_layers),
    }
    ids: dict[str, Any] = {f"{name}_token_id": tokenizer.vocab[token] for name, token in TOKENS.items()}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **ids)
    model = Qwen3VLForConditionalGeneration(config).eval()
    redraw_weights(model, shape.seed)
    return model.to(getattr(torch, shape.dtype))


def hf_inputs(
    folder: Path,
    text: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
    fps: Sequence[float] = (),
    indices: Sequence[Sequence[int]] = (),
    **options: Any,
) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt, with ``options`` for the pictures.

    Its video processor needs torchvision for pixels, so frames of its sizes go through the picture processor, as in
    ``qwen2_vl``. What stands for a video replaces the tags around its mark, too, as up to transformers 4 and in
    training; transformers 5 leaves them.

    Args:
        fps: of each video's recording.
        indices: in it, of the frames given; by default they are all of it.
    """
    inputs: dict[str, Any] = {}
    if videos:
        pictures: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)
        made = [video_patches(pictures, _resized(frames), {"do_resize": False}) for frames in videos]
        speeds = fps or [24.0] * len(videos)
        inputs["pixel_values_videos"] = torch.cat([patches for patches, _ in made])
        inputs["video_grid_thw"] = torch.tensor([grid for _, grid in made])
        taken = indices or [range(len(frames)) for frames in videos]
        known = [
            SimpleNamespace(fps=speed, frames_indices=list(chosen)) for chosen, speed in zip(taken, speeds, strict=True)
        ]
        tags = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
        processor: Any = SimpleNamespace(
            video_processor=pictures,
            video_token="<|video_pad|>",
            _calculate_timestamps=lambda *given: Qwen3VLProcessor._calculate_timestamps(processor, *given),
            **tags,
        )
        waiting = iter(range(len(videos)))
        text = re.sub(
            re.escape(VIDEO),
            lambda _: Qwen3VLProcessor.replace_video_token(
                processor, inputs | {"video_metadata": known}, next(waiting)
            ),
            text,
        )
    return inputs | qwen2_vl.hf_inputs(folder, text, images, **options)


def _resized(frames: Sequence[Image.Image]) -> list[Image.Image]:
    width, height = frames[0].size
    bounds = VIDEO_BOUNDS["shortest_edge"], VIDEO_BOUNDS["longest_edge"]
    rows, cols = smart_resize(max(len(frames), 2), height, width, 2, UNIT, *bounds)
    return [frame.resize((cols, rows), Image.Resampling.BICUBIC) for frame in frames]
