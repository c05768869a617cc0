"""Model families. This module is torch-free: it only knows their names; ``resolve`` says where a family lives.

Adding one is a folder with ``rule.py`` (what its pictures become) and ``model.py`` (what computes them), and a line
in ``MODELS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from opsin.errors import UnsupportedModelError


class Family(NamedTuple):
    """Where one architecture's two halves live, as "module:Class".

    ``tower`` is the vision tower's model type where it alone makes the architecture this family.
    """

    architecture: str
    rule: str
    model: str
    tower: str | None = None

    @property
    def folder(self) -> str:
        """The family's own name: its folder here."""
        return self.rule.split(".")[2]

    @property
    def name(self) -> str:
        """The architecture, with the tower that tells it from others of the same."""
        return self.architecture if self.tower is None else f"{self.architecture} ({self.tower})"

    def load_rule(self) -> Any:
        """The ``MediaRule`` class; imports no torch."""
        return _load(self.rule)

    def load_model(self) -> Any:
        """The ``VisionLanguageModel`` class; imports torch."""
        return _load(self.model)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _family(architecture: str, folder: str, name: str, tower: str | None = None) -> Family:
    package = f"opsin.models.{folder}"
    return Family(architecture, f"{package}.rule:{name}Rule", f"{package}.model:{name}Model", tower)


MODELS: tuple[Family, ...] = (
    _family("Gemma3ForConditionalGeneration", "gemma3", "Gemma3"),
    _family("Glm46VForConditionalGeneration", "glm4v", "Glm4v"),
    _family("Glm4vForConditionalGeneration", "glm4v", "Glm4v"),
    _family("Idefics3ForConditionalGeneration", "idefics3", "Idefics3"),
    _family("InternVLForConditionalGeneration", "internvl", "InternVL"),
    _family("LlavaForConditionalGeneration", "mistral3", "Mistral3", tower="pixtral"),
    _family("LlavaForConditionalGeneration", "llava", "Llava"),
    _family("LlavaNextForConditionalGeneration", "llava_next", "LlavaNext"),
    _family("LlavaOnevisionForConditionalGeneration", "llava_onevision", "LlavaOnevision"),
    _family("MiniCPMV", "minicpmv", "MiniCPMV"),
    _family("Mistral3ForConditionalGeneration", "mistral3", "Mistral3"),
    _family("Phi3VForCausalLM", "phi3_v", "Phi3V"),
    _family("PaliGemmaForConditionalGeneration", "paligemma", "PaliGemma"),
    _family("Qwen2VLForConditionalGeneration", "qwen2_vl", "Qwen2VL"),
    _family("Qwen2_5_VLForConditionalGeneration", "qwen2_vl", "Qwen2VL"),
    _family("Qwen3VLForConditionalGeneration", "qwen3_vl", "Qwen3VL"),
    _family("SmolVLMForConditionalGeneration", "idefics3", "Idefics3"),
)


def resolve(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its ``architectures`` and its vision tower.

    Raises:
        UnsupportedModelError: none of them is supported; the message lists those that are.
    """
    architectures: list[str] = config.get("architectures") or []
    tower = (config.get("vision_config") or {}).get("model_type")
    for family in MODELS:
        if family.architecture in architectures and family.tower in (None, tower):
            return family
    named = ", ".join(architectures) or "no architecture"
    supported = ", ".join(sorted({family.architecture for family in MODELS}))
    raise UnsupportedModelError(f"The model's config.json names {named}. Supported architectures are: {supported}.")
