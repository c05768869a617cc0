"""From a model's name to its folder and its JSON files. No torch, no transformers.

A name is 'demo' (the model inside this package), a local folder, or a Hugging Face id, downloaded once into the
hub's own cache. Pickled weights are never downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from opsin.errors import ConfigError

DEMO = "demo"
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_USE_A_FOLDER = "Or download the model elsewhere and give its folder as the model."


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model folder in Hugging Face layout, its JSON read.

    Attributes:
        config: config.json, with the caller's overrides laid over it.
        generation_config: generation_config.json, or empty.
        processor: the picture processor's settings, whether they were in preprocessor_config.json or in
            processor_config.json, whose other settings are laid over them. Those for videos, where the folder has any,
            are a mapping of their own in it, under "video_processor".
    """

    folder: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    processor: Mapping[str, Any]

    @property
    def dtype(self) -> str:
        """The checkpoint's own dtype by name; float32 where it says none."""
        text_config = self.config.get("text_config") or {}
        for config in (self.config, text_config):
            for key in ("dtype", "torch_dtype"):
                if isinstance(config.get(key), str):
                    return config[key].removeprefix("torch.")
        return "float32"


def find_model(
    model: str, *, revision: str | None = None, overrides: Mapping[str, Any] | None = None, weights: bool = True
) -> ModelFiles:
    """Find a model's folder, downloading it if ``model`` is a hub id, and read its configs.

    Args:
        overrides: values that replace config.json's; nested mappings are merged.
        weights: False downloads everything but the weights (for dummy ones).

    Raises:
        ConfigError: no such model, no access to it, or a config that is not JSON.
    """
    folder = _find_folder(model, revision, weights)
    config = _read_json(folder / "config.json")
    if config is None:
        raise ConfigError(f"{folder} has no config.json, so it is not a model folder in Hugging Face layout.")
    processor = _read_json(folder / "preprocessor_config.json") or {}
    joint = _read_json(folder / "processor_config.json") or {}
    nested = joint.pop("image_processor", None) or {}
    video = joint.pop("video_processor", None) or _read_json(folder / "video_preprocessor_config.json") or {}
    return ModelFiles(
        folder=folder,
        config=_merge(config, overrides or {}),
        generation_config=_read_json(folder / "generation_config.json") or {},
        processor=processor | joint | nested | ({"video_processor": video} if video else {}),
    )


def _find_folder(model: str, revision: str | None, weights: bool) -> Path:
    if model == DEMO:
        folder = Path(str(resources.files("opsin"))) / "demo" / "model"
        if not folder.is_dir():
            raise ConfigError("This installation lacks the demo model's files. Install opsin again.")
        return folder
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.exists():
        raise ConfigError(f"{model!r} is not a folder. Give a model folder, a Hugging Face id, or {DEMO!r}.")
    return _download(model, revision, weights)


def _download(model: str, revision: str | None, weights: bool) -> Path:
    # Imported here: it takes long, and local folders do not need it.
    from huggingface_hub import errors, snapshot_download

    patterns = [p for p in _PATTERNS if weights or p != "*.safetensors"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{model} is gated: accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN. "
            + _USE_A_FOLDER
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{model} has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"The hub has no model {model!r}, or this account may not see it. Check the name, or log in. "
            + _USE_A_FOLDER
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{model!r} is neither a folder nor a Hugging Face id: {error}") from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{model} is not in the local cache, and the hub cannot be reached ({type(error).__name__}: {error}). "
            + _USE_A_FOLDER
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected an object.")
    return values


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
