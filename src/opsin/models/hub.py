"""From a model's name to its folder and its JSON files. No torch, no transformers.

A name is 'demo' (the model inside this package), a local folder, or a Hugging Face id, downloaded once into the
hub's own cache. Pickled weights are never downloaded.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from opsin.errors import ConfigError

DEMO = "demo"
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_OF_THE_DISK = (OSError, PermissionError)  # not those of sockets and TLS, which have numbers of their own
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
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{folder} holds an adapter, not a model: merge it into its model (peft's merge_and_unload) and give "
                "that one's folder."
            )
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


def read_generation_config(folder: Path) -> Mapping[str, Any]:
    """A folder's generation_config.json.

    Raises:
        ConfigError: there is none, or it is not JSON.
    """
    found = _read_json(folder / "generation_config.json")
    if found is None:
        raise ConfigError(
            f"generation_config: {folder} has no generation_config.json; give a folder that has, 'auto' or 'vllm'."
        )
    return found


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
        raise ConfigError(f"{model!r} is neither a folder nor a Hugging Face id: {_line(error)}") from error
    except Exception as error:  # the client's own errors, those of whatever HTTP library it uses, and the disk's
        raise ConfigError(f"{model} cannot be had: it is not whole in the local cache, and {_why(error)}") from error


def _why(error: BaseException) -> str:
    """What kept the hub's client from downloading, and what to do about it, in one line."""
    links = list(_chain(error))
    names = {kind.__name__ for link in links for kind in type(link).__mro__}
    hub = os.environ.get("HF_ENDPOINT", "the hub")
    statuses = [link.response.status_code for link in links if getattr(link, "response", None) is not None]  # type: ignore[attr-defined]
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE keeps the hub from being asked. Unset it. " + _USE_A_FOLDER
    if 401 in statuses:
        return f"{hub} refused the token (HTTP 401). Log in with `hf auth login`, or correct HF_TOKEN. " + _USE_A_FOLDER
    if statuses:
        return f"{hub} answered with HTTP status {statuses[0]}. Try again later. " + _USE_A_FOLDER
    of_the_system = [link for link in links if isinstance(link, OSError) and type(link) in _OF_THE_DISK]
    disk = next((link for link in of_the_system if link.errno in _DISK_ERRORS), None)
    if disk is not None:
        return (
            f"it cannot be written there: {disk.strerror}. Make room, or set HF_HOME to a folder on another disk. "
            + _USE_A_FOLDER
        )
    if any(isinstance(link, socket.gaierror) for link in links) or "Name or service not known" in str(error):
        what = "cannot be found (its name does not resolve)"
    elif "ProxyError" in names:
        what = "cannot be reached through the proxy"
    elif names & {"TimeoutError", "TimeoutException", "Timeout"}:
        what = "did not answer in time"
    elif "SSLError" in names:
        what = "has a certificate that cannot be verified"
    elif "ConnectionRefusedError" in names or "Connection refused" in str(error):
        what = "refused the connection"
    else:
        what = f"cannot be reached ({_line(links[-1])})"
    return f"{hub} {what}. Check the network, and HF_ENDPOINT and the proxy's variables if set. " + _USE_A_FOLDER


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}"


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
