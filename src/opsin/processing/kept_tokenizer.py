"""What transformers makes of a folder's tokenizer, and a copy of it in the user's cache.

``AutoTokenizer`` alone knows all the exceptions of all the classes. But importing it takes one second with the latest
transformers and ten with some versions, and reading the copy a tenth of one.
"""

# transformers does not type what it loads.
# pyright: standard

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opsin.errors import ConfigError

_READ = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Suffixes of the files that a tokenizer may depend on."""
_FORM = 1  # of the copies, and of how transformers is asked
_MAX_KEPT = 32
_FACTS = ("special_tokens_map", "chat_template", "bos_token", "eos_token_id", "unk_token_id")


@dataclass(frozen=True, slots=True)
class KeptTokenizer:
    """Stands for a transformers tokenizer, with what ``Tokenizer`` reads of one."""

    folder: Path
    backend_tokenizer: Any  # of tokenizers, the Rust half
    special_tokens_map: dict[str, Any]
    chat_template: str | dict[str, str] | None
    bos_token: str | None
    eos_token_id: int | None
    unk_token_id: int | None

    def reopen(self) -> Any:
        """The transformers tokenizer that this was made of."""
        return _from_transformers(self.folder)


def open_tokenizer(folder: Path, cache: Path | None) -> Any:
    """A transformers tokenizer, or what stands for it.

    Args:
        cache: where copies are kept, if anywhere; one that cannot be read or written is done without.
    """
    if cache is None:
        return _from_transformers(folder)
    copy = cache / f"{_key(folder)}.json"
    kept = _read(copy, folder)
    if kept is not None:
        return kept
    opened = _from_transformers(folder)
    _keep(opened, copy)
    return opened


def _read(copy: Path, folder: Path) -> KeptTokenizer | None:
    """None where there is no copy, or none that is whole: it is made anew."""
    from tokenizers import Tokenizer as Backend

    try:
        with copy.open(encoding="utf-8") as file:
            facts = json.loads(file.readline())
            return KeptTokenizer(folder, Backend.from_str(file.read()), **facts)
    except Exception:  # tokenizers raises nothing narrower
        return None


def _from_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    settings = {"local_files_only": True, "trust_remote_code": False, "config": _config_of(folder)}
    try:
        return AutoTokenizer.from_pretrained(str(folder), **settings)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no tokenizer in {folder} that transformers can open; tokenizer.json and tokenizer_config.json "
            f"belong there. It says: {str(error).strip().splitlines()[0]}"
        ) from error


def _config_of(folder: Path) -> Any:
    """What AutoTokenizer need know of a checkpoint's config; None where it must read it itself.

    Where tokenizer_config.json names a class, that is the kind of model alone. The real config's class would import
    transformers' modelling code, half of the time that a start takes. A checkpoint that transformers has no code for
    it would read alike, but with warnings that its users need not heed.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    values, tokenizer_values = (_read_json(folder / name) for name in ("config.json", "tokenizer_config.json"))
    is_foreign = "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING
    if not is_foreign and "tokenizer_class" not in tokenizer_values:
        return None
    told = {name: values[name] for name in ("model_type", "tokenizer_class") if name in values}
    return PreTrainedConfig.from_dict({**told, "_name_or_path": str(folder)})


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _key(folder: Path) -> str:
    """Of all that the copy depends on: the folder's own name too, since transformers knows some models by it."""
    digest = hashlib.blake2b(str(_FORM).encode(), digest_size=20)
    for name in ("transformers", "tokenizers"):
        digest.update(f"{name} {version(name)}\n".encode())
    digest.update(f"{folder.resolve()}\n".encode())
    for path in _files(folder):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for where in (folder, folder / "additional_chat_templates"):
        if where.is_dir():
            found = sorted(where.iterdir())
            read = (path for path in found if path.suffix in _READ and path.is_file())
            yield from (path for path in read if not path.name.endswith(".index.json"))


def _keep(opened: Any, copy: Path) -> None:
    """Write a copy, whole or not at all, and forget the oldest of many."""
    backend = getattr(opened, "backend_tokenizer", None)
    if backend is None or backend.encode_special_tokens:  # which to_str leaves out
        return
    try:
        told = json.dumps({name: getattr(opened, name, None) for name in _FACTS}) + "\n" + backend.to_str()
    except Exception:  # tokenizers raises nothing narrower, of parts in Python; not every fact has a form, either
        return
    with contextlib.suppress(OSError):  # no room, or no right
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=copy.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(told)
            os.replace(name, copy)
        except OSError:
            os.unlink(name)
            raise
        kept = sorted(copy.parent.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[_MAX_KEPT:]:
            path.unlink(missing_ok=True)
