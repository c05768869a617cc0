"""The checkpoints on the hub that opsin names: their configs, and folders with these for dummy weights.

A folder has the released config.json and processors' settings, but the tokenizer of a tiny checkpoint, whose tokens for
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
    GLM4V,
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
from tests.factories.hub_processors import JOINT, PICTURES
from tests.factories.named import write_named

_MEDIA_TOKEN = re.compile(r"(image|video|vision|boi|eoi)\w*_token_(id|index)")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class Released:
    """A checkpoint on the hub.

    Attributes:
        tiny: name in ``tests.factories.named`` of the family whose tokenizer stands in for its own.
        processor: its name in ``tests.factories.hub_processors``.
        billions: of parameters.
        template: name of the chat template that has to be given; such checkpoints were trained to give vectors.
        ran: where and how somebody ran its released weights, if anybody did.
    """

    hub_id: str
    tiny: str
    config: Mapping[str, Any] = field(repr=False)
    processor: str
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
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES[released.processor]))
    if released.processor in JOINT:
        (folder / "processor_config.json").write_text(json.dumps(JOINT[released.processor]))
    return folder


RELEASED = (
    Released("llava-hf/llava-1.5-7b-hf", "llava", LLAVA["1.5-7b"], "llava-1.5", 7.1),
    Released("llava-hf/llava-v1.6-mistral-7b-hf", "llava-next", LLAVA_NEXT["v1.6-mistral-7b"], "llava-1.6", 7.6),
    Released("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-next", LLAVA_NEXT["v1.6-vicuna-7b"], "llava-1.6", 7.1),
    Released(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision",
        LLAVA_ONEVISION["qwen2-0.5b-ov"],
        "onevision",
        0.9,
    ),
    Released(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-onevision", LLAVA_ONEVISION["qwen2-7b-ov"], "onevision", 8.0
    ),
    Released("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl", QWEN2_VL["qwen2-vl-2b"], "qwen2-vl", 2.2),
    Released("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", QWEN2_VL["qwen2-vl-7b"], "qwen2-vl", 8.3),
    Released(
        "MrLight/dse-qwen2-2b-mrl-v1", "qwen2_vl", QWEN2_VL["qwen2-vl-2b"], "qwen2-vl", 2.2, template="dse_qwen2_vl"
    ),
    Released("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", QWEN2_VL["qwen2.5-vl-3b"], "qwen2.5-vl", 3.8),
    Released("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", QWEN2_VL["qwen2.5-vl-7b"], "qwen2.5-vl", 8.3),
    Released("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", QWEN3_VL["qwen3-vl-4b-instruct"], "qwen3-vl", 4.4),
    Released("zai-org/GLM-4.1V-9B-Thinking", "glm4_1v", GLM4V["glm-4.1v-9b-thinking"], "glm-4.1v", 10.3),
    Released("zai-org/GLM-4.6V-Flash", "glm4_6v", GLM4V["glm-4.6v-flash"], "glm-4.6v-flash", 10.3),
    Released("OpenGVLab/InternVL3-1B-hf", "internvl", INTERNVL["internvl3-1b"], "internvl3", 0.9),
    Released(
        "HuggingFaceM4/Idefics3-8B-Llama3",
        "idefics3",
        IDEFICS3["idefics3-8b-llama3"],
        "idefics3",
        8.5,
    ),
    Released(
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        "idefics3",
        IDEFICS3["smolvlm-256m"],
        "smolvlm-256m",
        0.26,
    ),
    Released(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "smolvlm",
        IDEFICS3["smolvlm2-2.2b"],
        "smolvlm2-2.2b",
        2.2,
    ),
    Released("google/gemma-3-4b-it", "gemma3", GEMMA3["gemma-3-4b-it"], "gemma3", 4.3),
    Released("google/paligemma-3b-pt-224", "paligemma", PALIGEMMA["paligemma-3b-pt-224"], "paligemma-224", 2.9),
    Released("google/paligemma2-3b-pt-224", "paligemma", PALIGEMMA["paligemma2-3b-pt-224"], "paligemma-224", 3.0),
    Released(
        "mistral-community/pixtral-12b",
        "pixtral_hf",
        MISTRAL3["pixtral-12b"],
        "pixtral-12b",
        12.7,
    ),
    Released(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistral3",
        MISTRAL3["mistral-small-3.1-24b"],
        "mistral-small-3.1",
        24.0,
    ),
    Released("microsoft/Phi-3-vision-128k-instruct", "phi3_v", PHI3_V["phi-3-vision-128k"], "phi-3-vision", 4.1),
    Released("microsoft/Phi-3.5-vision-instruct", "phi3_v", PHI3_V["phi-3.5-vision"], "phi-3.5-vision", 4.1),
    Released("TIGER-Lab/VLM2Vec-Full", "phi3_v", PHI3_V["vlm2vec-full"], "phi-3.5-vision", 4.1, template="vlm2vec"),
    Released("openbmb/MiniCPM-V-2_6", "minicpmv", minicpmv.hub_config(), "minicpm-v-2.6", 8.1),
)
