"""The checkpoints on the hub that opsin names: their configs, and folders with these for dummy weights.

A folder has the released config.json and picture settings, but the tokenizer of a tiny checkpoint, whose tokens for
pictures and videos are written into config.json: the released tokenizers cannot be had without a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.factories import minicpmv
from tests.factories.hub_configs import (
    GEMMA3,
    IDEFICS3,
    INTERNVL,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    MISTRAL3,
    PALIGEMMA,
    PHI3_V,
    QWEN2_VL,
    QWEN3_VL,
)
from tests.factories.named import write_named

_MEDIA_TOKEN = re.compile(r"(image|video|vision|boi|eoi)\w*_token_(id|index)")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class Released:
    """A checkpoint on the hub.

    Attributes:
        tiny: name in ``tests.factories.named`` of the family whose tokenizer stands in for its own.
        processor: the picture processor's settings, where they are not its class's defaults.
        billions: of parameters.
        template: name of the chat template that has to be given; such checkpoints were trained to give vectors.
        ran: where and how somebody ran its released weights, if anybody did.
    """

    hub_id: str
    tiny: str
    config: Mapping[str, Any] = field(repr=False)
    processor: Mapping[str, Any] = field(repr=False)
    billions: float
    template: str | None = None
    ran: str | None = None

    @property
    def pools(self) -> bool:
        return self.template is not None


def write_dummy(folder: Path, released: Released) -> Path:
    """Write what ``load_format="dummy"`` needs of a checkpoint."""
    write_named(folder, released.tiny)
    tiny = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in released.config.items() if not _MEDIA_TOKEN.fullmatch(key)}
    config |= {key: value for key, value in tiny.items() if _MEDIA_TOKEN.fullmatch(key)}
    for name in ("model.safetensors", *_PROCESSOR_FILES):
        (folder / name).unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(released.processor))
    return folder


def _square(name: str, edge: int) -> dict[str, Any]:
    return {"image_processor_type": name, "size": {"height": edge, "width": edge}}


def _edges(name: str, longest: int, tile: int, num_features: int) -> dict[str, Any]:
    sizes = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    return {"image_processor_type": name, **sizes, "image_seq_len": num_features}


_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_CLIP_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
_LLAVA_1_5 = {"image_processor_type": "CLIPImageProcessor", **_CLIP_336}
_LLAVA_1_6 = {
    "image_processor_type": "LlavaNextImageProcessor",
    **_CLIP_336,
    "image_grid_pinpoints": LLAVA_NEXT["v1.6-mistral-7b"]["image_grid_pinpoints"],
}
_ONEVISION = {
    **_square("LlavaOnevisionImageProcessor", 384),
    **_HALVES,
    "image_grid_pinpoints": LLAVA_ONEVISION["qwen2-7b-ov"]["image_grid_pinpoints"],
}
_QWEN2_VL = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN3_VL = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    **_HALVES,
}
_INTERNVL3 = {
    **_square("GotOcr2ImageProcessorFast", 448),
    **_IMAGENET,
    "crop_to_patches": True,
    "min_patches": 1,
    "max_patches": 12,
}
_PALIGEMMA = {**_square("SiglipImageProcessor", 224), **_HALVES, "image_seq_length": 256}
_PHI3_V = {"image_processor_type": "Phi3VImageProcessor", "num_img_tokens": 144, "num_crops": 16}
_PHI3_5_V = _PHI3_V | {"num_crops": 4}
_MINICPMV = {
    "image_processor_type": "MiniCPMVImageProcessor",
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "use_image_id": True,
    "image_feature_size": 64,
    "slice_mode": True,
    "norm_mean": [0.5, 0.5, 0.5],
    "norm_std": [0.5, 0.5, 0.5],
    "version": 2.6,
}


RELEASED = (
    Released("llava-hf/llava-1.5-7b-hf", "llava", LLAVA["1.5-7b"], _LLAVA_1_5, 7.1),
    Released("llava-hf/llava-v1.6-mistral-7b-hf", "llava-next", LLAVA_NEXT["v1.6-mistral-7b"], _LLAVA_1_6, 7.6),
    Released("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-next", LLAVA_NEXT["v1.6-vicuna-7b"], _LLAVA_1_6, 7.1),
    Released(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision",
        LLAVA_ONEVISION["qwen2-0.5b-ov"],
        _ONEVISION,
        0.9,
    ),
    Released(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-onevision", LLAVA_ONEVISION["qwen2-7b-ov"], _ONEVISION, 8.0
    ),
    Released("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl", QWEN2_VL["qwen2-vl-2b"], _QWEN2_VL, 2.2),
    Released("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", QWEN2_VL["qwen2-vl-7b"], _QWEN2_VL, 8.3),
    Released(
        "MrLight/dse-qwen2-2b-mrl-v1", "qwen2_vl", QWEN2_VL["qwen2-vl-2b"], _QWEN2_VL, 2.2, template="dse_qwen2_vl"
    ),
    Released("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", QWEN2_VL["qwen2.5-vl-3b"], _QWEN2_VL, 3.8),
    Released("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", QWEN2_VL["qwen2.5-vl-7b"], _QWEN2_VL, 8.3),
    Released("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", QWEN3_VL["qwen3-vl-4b-instruct"], _QWEN3_VL, 4.4),
    Released("OpenGVLab/InternVL3-1B-hf", "internvl", INTERNVL["internvl3-1b"], _INTERNVL3, 0.9),
    Released(
        "HuggingFaceM4/Idefics3-8B-Llama3",
        "idefics3",
        IDEFICS3["idefics3-8b-llama3"],
        _edges("Idefics3ImageProcessor", 1456, 364, 169),
        8.5,
    ),
    Released(
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        "idefics3",
        IDEFICS3["smolvlm-256m"],
        _edges("Idefics3ImageProcessor", 2048, 512, 64),
        0.26,
    ),
    Released(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "smolvlm",
        IDEFICS3["smolvlm2-2.2b"],
        _edges("SmolVLMImageProcessor", 1536, 384, 81),
        2.2,
    ),
    Released("google/gemma-3-4b-it", "gemma3", GEMMA3["gemma-3-4b-it"], _square("Gemma3ImageProcessor", 896), 4.3),
    Released("google/paligemma-3b-pt-224", "paligemma", PALIGEMMA["paligemma-3b-pt-224"], _PALIGEMMA, 2.9),
    Released("google/paligemma2-3b-pt-224", "paligemma", PALIGEMMA["paligemma2-3b-pt-224"], _PALIGEMMA, 3.0),
    Released(
        "mistral-community/pixtral-12b",
        "pixtral_hf",
        MISTRAL3["pixtral-12b"],
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 1024}, "patch_size": 16},
        12.7,
    ),
    Released(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistral3",
        MISTRAL3["mistral-small-3.1-24b"],
        {
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 1540},
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        24.0,
    ),
    Released(
        "microsoft/Phi-3-vision-128k-instruct", "phi3_v", PHI3_V["phi-3-vision-128k"], _PHI3_V | {"num_crops": 16}, 4.1
    ),
    Released("microsoft/Phi-3.5-vision-instruct", "phi3_v", PHI3_V["phi-3.5-vision"], _PHI3_5_V, 4.1),
    Released("TIGER-Lab/VLM2Vec-Full", "phi3_v", PHI3_V["vlm2vec-full"], _PHI3_5_V, 4.1, template="vlm2vec"),
    Released("openbmb/MiniCPM-V-2_6", "minicpmv", minicpmv.hub_config(), _MINICPMV, 8.1),
)
