"""A model's folder, opened as far as prompts need it: configuration, tokenizer, rule. No weights, no device."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opsin.config import EngineConfig, ModelConfig
from opsin.engine.engine import EngineFacts
from opsin.errors import ConfigError, RequestError
from opsin.models import Family, resolve
from opsin.models.hub import ModelFiles, find_model, read_generation_config
from opsin.processing.grammar import GrammarCheck
from opsin.processing.jinja import read_template
from opsin.processing.pooling import VectorSizes
from opsin.processing.processor import InputProcessor
from opsin.processing.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What both halves of an engine read of a model: the one that makes requests, and the one that runs them."""

    files: ModelFiles
    family: Family
    tokenizer: Tokenizer
    rule: Any  # the family's, which is a MediaRule

    @classmethod
    def open(cls, config: EngineConfig) -> Checkpoint:
        """Find the model, download it if need be, and open its tokenizer and rule.

        Raises:
            ConfigError, UnsupportedModelError: what is wrong, and what to do.
        """
        files, family = find(config.model)
        if config.model.generation_config not in ("auto", "vllm"):
            generation = read_generation_config(Path(config.model.generation_config).expanduser())
            files = replace(files, generation_config=generation)
        folder = _tokenizer_folder(config.model, files)
        tokenizer = Tokenizer.from_folder(folder, files.generation_config, cache=_cache_folder())
        rule = family.load_rule().from_hf(files.config, files.processor, tokenizer)
        return cls(files, family, tokenizer, rule)

    def processor(self, config: EngineConfig, facts: EngineFacts, grammars: GrammarCheck) -> InputProcessor:
        """What makes requests for an engine.

        Args:
            facts: the engine's.

        Raises:
            ConfigError: ``override_generation_config`` has a value that cannot be.
        """
        given = config.model.chat_template
        override = config.model.override_generation_config
        defaults = dict[str, Any]() if config.model.generation_config == "vllm" else self.files.generation_config
        processor = InputProcessor(
            self.tokenizer,
            self.rule,
            facts.spec,
            media=config.media,
            max_model_len=facts.max_model_len,
            generation_config={**defaults, **override},
            max_answer_len=override.get("max_new_tokens"),
            default_seed=config.model.seed,
            family=self.family.folder,
            folder=self.files.folder,
            chat_template=None if given is None else read_template(given),
            grammars=grammars,
            vector_sizes=VectorSizes.from_config(self.files.config, facts.spec.hidden_size),
        )
        if override:
            try:
                processor.default_sampling_params()
            except RequestError as error:  # said now, not to everybody who asks
                raise ConfigError(f"override_generation_config: {error}") from error
        return processor


def find(config: ModelConfig) -> tuple[ModelFiles, Family]:
    """A model's files and family; what is not supported is said here, before anything large is loaded.

    Raises:
        ConfigError, UnsupportedModelError: what is wrong, and what to do.
    """
    files = find_model(
        config.model,
        revision=config.revision,
        overrides=config.hf_overrides,
        weights=config.load_format != "dummy",
    )
    return files, resolve(files.config)


def _cache_folder() -> Path | None:
    """Where this user's tokenizers are kept, by the XDG base directory specification; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return Path(base) / "opsin" / "tokenizers" if os.path.isabs(base) else None


def _tokenizer_folder(config: ModelConfig, files: ModelFiles) -> Path:
    if config.tokenizer is None:
        return files.folder
    if os.path.isdir(config.tokenizer):
        return Path(config.tokenizer)
    return find_model(config.tokenizer, weights=False).folder
