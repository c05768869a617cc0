"""Tiny checkpoints by the names under which the examples and the seed's page know their families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.factories import minicpmv
from tests.factories.families import FAMILIES

ROWS = {
    "gemma3": ("gemma3", 0),
    "glm4_1v": ("glm4v", 0),
    "glm4_6v": ("glm4v", 1),
    "idefics3": ("idefics3", 0),
    "internvl": ("internvl", 0),
    "llava": ("llava", 0),
    "llava-next": ("llava_next", 1),
    "llava-onevision": ("llava_onevision", 0),
    "mistral3": ("mistral3", 0),
    "paligemma": ("paligemma", 0),
    "phi3_v": ("phi3_v", 0),
    "pixtral_hf": ("mistral3", 1),
    "qwen2_vl": ("qwen2_vl", 0),
    "qwen2_5_vl": ("qwen2_vl", 1),
    "qwen3_vl": ("qwen3_vl", 0),
    "smolvlm": ("idefics3", 1),
}

_PHI3_TEMPLATE = (  # the family's, which takes content as text, so that the engine numbers the placeholders
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def write_named(folder: Path, name: str) -> Path:
    """Write a tiny checkpoint of the family that goes by this name."""
    write, shape = _writer(name)
    write(folder, shape)
    if name == "phi3_v":
        (folder / "chat_template.jinja").write_text(_PHI3_TEMPLATE)
    return folder


def _writer(name: str) -> tuple[Callable[[Path, Any], Path], Any]:
    if name == "minicpmv":
        return minicpmv.write_minicpmv, minicpmv.MiniCPMVShape()
    row, number = ROWS[name]
    (family,) = [family for family in FAMILIES if family.name == row]
    return family.write, family.shapes[family.served[number]]
