"""Tiny random Qwen2-VL and Qwen2.5-VL checkpoints in Hugging Face layout, drawn as ``tests.factory`` draws LLaVA's.

``hf_inputs`` prepares a prompt as transformers' processor does. That class itself wants a video processor and with it
torchvision, so its parts are called one by one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.factory import VOCAB_SIZE, redraw_weights, write_chatml_tokenizer, write_generation_config

PATCH_SIZE = 8
UNIT = 2 * PATCH_SIZE
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SIGNS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VLShape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        num_kv_heads: of 4 heads of 16 values.
        max_pixels: 16 x 16 of them make a feature.
        text_extra: more keys of the text config.
        flat: config.json keeps the text config's keys at its top, as the hub's checkpoints do, in transformers 4's
            spelling.
    """

    version: Literal["2", "2.5"] = "2"
    num_kv_heads: int = 2
    num_layers: int = 2
    tied: bool = False
    max_pixels: int = 40 * UNIT**2
    text_extra: tuple[tuple[str, Any], ...] = ()
    flat: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0


def write_qwen2_vl(folder: Path, shape: Qwen2VLShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = write_chatml_tokenizer(folder, SIGNS, IMAGE)
    build_qwen2_vl(shape, tokenizer).save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    size = {"shortest_edge": 4 * UNIT**2, "longest_edge": shape.max_pixels}
    Qwen2VLImageProcessorPil(size=size, patch_size=PATCH_SIZE).save_pretrained(folder)
    if shape.flat:
        _flatten_config(folder / "config.json")
    return folder


def build_qwen2_vl(shape: Qwen2VLShape, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The transformers model, in eval mode."""
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **dict(shape.text_extra),
    }
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": PATCH_SIZE}
    if shape.version == "2":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
        vision |= {"window_size": 3 * UNIT, "fullatt_block_indexes": [1]}
    classes: dict[str, Any] = {
        "2": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        "2.5": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    }
    config_class, model_class = classes[shape.version]
    config = config_class(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=shape.tied,
        **{f"{name}_token_id": tokenizer.vocab[token] for name, token in TOKENS.items()},
    )
    model = model_class(config).eval()
    redraw_weights(model, shape.seed)
    return model.to(getattr(torch, shape.dtype))


TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}


def _flatten_config(path: Path) -> None:
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    config["vision_config"] |= {"model_type": "qwen2_vl", "in_chans": 3, "spatial_patch_size": PATCH_SIZE}
    for name in ("in_channels", "rope_parameters"):
        del config["vision_config"][name]
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    path.write_text(json.dumps(text | config))


def hf_inputs(
    folder: Path,
    text: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
    fps: Sequence[float] = (),
    **options: Any,
) -> dict[str, torch.Tensor]:
    """What transformers' ``Qwen2VLProcessor`` makes of a prompt, with ``options`` for the pictures.

    Its video processor needs torchvision, so frames go through the picture processor one by one, and two of them are
    laid together as that processor lays them.

    Args:
        fps: chosen frames per second of each video.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs: dict[str, Any] = {}
    pictures: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)
    processor: Any = SimpleNamespace(
        image_processor=pictures, image_token="<|image_pad|>", video_processor=pictures, video_token="<|video_pad|>"
    )
    if images:
        inputs |= dict(pictures(list(images), return_tensors="pt", **options))
        text = _expanded(text, "<|image_pad|>", lambda i: Qwen2VLProcessor.replace_image_token(processor, inputs, i))
    if videos:
        made = [video_patches(pictures, frames, options) for frames in videos]
        inputs["pixel_values_videos"] = torch.cat([patches for patches, _ in made])
        inputs["video_grid_thw"] = torch.tensor([grid for _, grid in made])
        if _model_type(folder) == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([2 / f for f in fps or [24.0] * len(videos)])
        text = _expanded(text, "<|video_pad|>", lambda i: Qwen2VLProcessor.replace_video_token(processor, inputs, i))
    inputs |= tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    ids = inputs["input_ids"]
    moving = ids == tokenizer.vocab["<|video_pad|>"]
    inputs["mm_token_type_ids"] = (ids == tokenizer.vocab["<|image_pad|>"]).int() + 2 * moving.int()
    return inputs


def positions(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rotary positions (3, 1, T) by the papers' rule: everything begins behind the highest position before it.

    transformers' own ``get_rope_index`` did so until 5.0; since then it leaves time out where text follows a video.
    """
    config = model.config.vision_config
    grids = {1: iter(inputs.get("image_grid_thw", [])), 2: iter(inputs.get("video_grid_thw", []))}
    seconds = iter(inputs.get("second_per_grid_ts", []))
    parts = [torch.zeros(3, 0, dtype=torch.long)]
    begin = 0
    for kind, group in itertools.groupby(inputs["mm_token_type_ids"][0].tolist()):
        if kind == 0:
            part = torch.arange(len(list(group))).expand(3, -1) + begin
        else:
            step = config.tokens_per_second * next(seconds) if kind == 2 and "second_per_grid_ts" in inputs else 1
            part = model.get_vision_position_ids(begin, next(grids[kind]), 1, config.spatial_merge_size, step)
        parts.append(part)
        begin = int(part.max()) + 1
    return torch.cat(parts, dim=1)[:, None]


def video_patches(
    pictures: Any, frames: Sequence[Image.Image], options: dict[str, Any]
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    frames = [*frames, *([frames[-1]] * (len(frames) % 2))]
    stills = [pictures(frame, return_tensors="pt", **options) for frame in frames]
    _, rows, cols = (int(n) for n in stills[0]["image_grid_thw"][0])
    halves = [s["pixel_values"].view(rows * cols, 3, 2, PATCH_SIZE**2) for s in stills]
    pairs = [torch.stack([a[:, :, 0], b[:, :, 1]], dim=2) for a, b in zip(halves[::2], halves[1::2], strict=True)]
    return torch.cat([pair.flatten(1) for pair in pairs]), (len(pairs), rows, cols)


def _expanded(text: str, sign: str, replacement: Callable[[int], str]) -> str:
    first, *pieces = text.split(sign)
    return first + "".join(replacement(i) + piece for i, piece in enumerate(pieces))


def _model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]
