"""Tiny random GLM-4.1V and GLM-4.6V checkpoints in Hugging Face layout, drawn as LLaVA's are.

``hf_inputs`` prepares a prompt as transformers' processors do. These want video processors and with them torchvision,
so their parts are called one by one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil, smart_resize
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.video_utils import VideoMetadata

from tests.factories.qwen2_vl import PATCH_SIZE, UNIT, video_patches
from tests.factory import VOCAB_SIZE, redraw_weights, write_chatml_tokenizer, write_generation_config

IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"
TOKENS = {
    "image": "<|image|>",
    "video": "<|video|>",
    "image_start": "<|begin_of_image|>",
    "image_end": "<|end_of_image|>",
    "video_start": "<|begin_of_video|>",
    "video_end": "<|end_of_video|>",
}
VIDEO_BOUNDS = {"shortest_edge": 4 * UNIT**2, "longest_edge": 48 * UNIT**2}  # pixels of all frames
_CLASSES: dict[str, Any] = {
    "4.1": (Glm4vConfig, Glm4vForConditionalGeneration, Glm4vImageProcessorPil, Glm4vProcessor),
    "4.6": (Glm46VConfig, Glm46VForConditionalGeneration, Glm46VImageProcessorPil, Glm46VProcessor),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm4vShape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        num_kv_heads: of 4 heads of 16 values.
        rotated: the part of a head that is rotated.
        max_pixels: of two frames, which a picture counts as; 16 x 16 of them make a feature.
        position_edge: of the square of learned positions.
        text_extra: more keys of the text config; likewise ``vision_extra``.
        flat: config.json keeps the text config's keys at its top, in transformers 4's spelling.
    """

    version: Literal["4.1", "4.6"] = "4.1"
    num_kv_heads: int = 2
    num_layers: int = 2
    tied: bool = False
    rotated: float = 0.5
    max_pixels: int = 80 * UNIT**2
    position_edge: int = 5
    text_extra: tuple[tuple[str, Any], ...] = ()
    vision_extra: tuple[tuple[str, Any], ...] = ()
    flat: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0


def write_glm4v(folder: Path, shape: Glm4vShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = write_chatml_tokenizer(folder, tuple(TOKENS.values()), IMAGE)
    build_glm4v(shape, tokenizer).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    size = {"shortest_edge": 8 * UNIT**2, "longest_edge": shape.max_pixels}
    pictures = _CLASSES[shape.version][2](size=size, patch_size=PATCH_SIZE)
    pictures.save_pretrained(folder)
    videos = {
        "video_processor_type": "Glm4vVideoProcessor" if shape.version == "4.1" else "Glm46VVideoProcessor",
        "size": VIDEO_BOUNDS,
        "patch_size": PATCH_SIZE,
        "image_mean": list(pictures.image_mean),
        "image_std": list(pictures.image_std),
        "do_sample_frames": False,
    }
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    if shape.flat:
        _flatten_config(folder / "config.json")
    return folder


def build_glm4v(shape: Glm4vShape, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The transformers model, in eval mode."""
    rotated = round(16 * shape.rotated) // 2
    sections = [rotated // 4, (rotated - rotated // 4) // 2]
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": shape.rotated,
        "mrope_section": [*sections, rotated - sum(sections)],
    }
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": shape.num_kv_heads,
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
        "image_size": PATCH_SIZE * shape.position_edge,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        **dict(shape.vision_extra),
    }
    config_class, model_class, *_ = _CLASSES[shape.version]
    if shape.version == "4.6":  # which reads nested configs by their types
        text, vision = {"model_type": "glm4v_text", **text}, {"model_type": "glm4v_vision", **vision}
    ids: dict[str, Any] = {f"{name}_token_id": tokenizer.vocab[token] for name, token in TOKENS.items()}
    config = config_class(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **ids)
    model = model_class(config).eval()
    redraw_weights(model, shape.seed)
    return model.to(getattr(torch, shape.dtype))


def _flatten_config(path: Path) -> None:
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    del text["model_type"]
    del config["vision_config"]["rope_parameters"]
    text |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    text |= {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": rope["mrope_section"]}}
    path.write_text(json.dumps(text | config))


def hf_inputs(
    folder: Path,
    text: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
    fps: Sequence[float | None] = (),
    indices: Sequence[Sequence[int]] = (),
    **options: Any,
) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt, with ``options`` for the pictures.

    Its video processor needs torchvision for pixels, so frames of its sizes go through the picture processor, as in
    ``qwen2_vl``.

    Args:
        fps: of each video's recording.
        indices: in it, of the frames given; by default they are all of it.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    is_4_6 = json.loads((folder / "config.json").read_text())["model_type"] == "glm46v"
    *_, picture_class, joint = _CLASSES["4.6" if is_4_6 else "4.1"]
    pictures: Any = picture_class.from_pretrained(folder)
    processor: Any = SimpleNamespace(
        image_processor=pictures,
        video_processor=pictures,
        image_token="<|image|>",
        image_token_id=tokenizer.vocab["<|image|>"],
        video_start_id=tokenizer.vocab["<|begin_of_video|>"],
        video_end_id=tokenizer.vocab["<|end_of_video|>"],
        replace_frame_token_id=lambda *given, **more: joint.replace_frame_token_id(processor, *given, **more),
    )
    inputs: dict[str, Any] = {}
    if images:
        inputs |= dict(pictures(list(images), return_tensors="pt", **options))
        first, *pieces = text.split("<|image|>")
        text = first + "".join(joint.replace_image_token(processor, inputs, i) + p for i, p in enumerate(pieces))
    if videos:
        made = [video_patches(pictures, _resized(frames), {"do_resize": False}) for frames in videos]
        inputs["pixel_values_videos"] = torch.cat([patches for patches, _ in made])
        inputs["video_grid_thw"] = torch.tensor([grid for _, grid in made])
        taken = indices or [range(len(frames)) for frames in videos]
        known = [
            VideoMetadata(total_num_frames=max(chosen) + 1, fps=speed, frames_indices=list(chosen))
            for chosen, speed in zip(taken, fps or [24.0] * len(videos), strict=True)
        ]
        about = inputs | {"video_metadata": known}
        first, *pieces = text.split("<|video|>")
        text = first + "".join(joint.replace_video_token(processor, about, i) + p for i, p in enumerate(pieces))
    inputs |= tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    inputs["mm_token_type_ids"] = torch.tensor(joint.create_mm_token_type_ids(processor, inputs["input_ids"].tolist()))
    return inputs


def _resized(frames: Sequence[Image.Image]) -> list[Image.Image]:
    width, height = frames[0].size
    bounds = VIDEO_BOUNDS["shortest_edge"], VIDEO_BOUNDS["longest_edge"]
    rows, cols = smart_resize(max(len(frames), 2), height, width, 2, UNIT, *bounds)
    return [frame.resize((cols, rows), Image.Resampling.BICUBIC) for frame in frames]
