"""A start from the kept copy of a tokenizer is a start from transformers' own, and stale or broken copies are nobody's
trouble."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import PreTokenizer

from opsin.errors import ConfigError
from opsin.processing.kept_tokenizer import KeptTokenizer, open_tokenizer
from opsin.processing.tokenizer import Tokenizer
from tests.processing import vocabularies

TEXT = "Hello, wörld!  Two  spaces,\n<|im_end|> and </s> tokens. 你好"


@pytest.fixture(params=vocabularies.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    vocabularies.huggingface(request.param).save_pretrained(folder)
    return folder


def facts(tokenizer: Tokenizer) -> list[object]:
    names = ("special_ids", "special_tokens_map", "chat_template", "bos_token", "eos_token_id", "eos_token_ids")
    more = ("vocab_size", "is_byte_level", "byte_ids", "longest_piece", "letter_id", "special_strings")
    ids = tokenizer.encode(TEXT)
    return [getattr(tokenizer, name) for name in (*names, *more)] + [
        ids, tokenizer.encode_plain(TEXT), tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)
    ]  # fmt: skip


def test_kept_copy_is_the_tokenizer(folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    first, again = (Tokenizer.from_folder(folder, cache=cache) for _ in range(2))
    assert not isinstance(first._hf, KeptTokenizer)
    assert isinstance(again._hf, KeptTokenizer)
    assert facts(again) == facts(first) == facts(Tokenizer.from_folder(folder))
    assert type(again.hf) is type(first.hf)
    assert again.hf.encode(TEXT) == first.hf.encode(TEXT)
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_changed_file_or_other_versions_make_a_new_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    vocabularies.huggingface(vocabularies.KINDS[0]).save_pretrained(folder)
    open_tokenizer(folder, cache)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert not isinstance(open_tokenizer(folder, cache), KeptTokenizer)
    assert open_tokenizer(folder, cache).chat_template == "{{ messages }}"
    monkeypatch.setattr("opsin.processing.kept_tokenizer.version", lambda name: f"{name} of tomorrow")
    assert not isinstance(open_tokenizer(folder, cache), KeptTokenizer)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["", "{}", '{"bos_token": 1}\n{', "\x00" * 100])
def test_damaged_copy_is_made_anew(damage: str, tmp_path: Path):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    vocabularies.huggingface(vocabularies.KINDS[0]).save_pretrained(folder)
    open_tokenizer(folder, cache)
    (copy,) = cache.iterdir()
    copy.write_text(damage)
    assert not isinstance(open_tokenizer(folder, cache), KeptTokenizer)
    assert isinstance(open_tokenizer(folder, cache), KeptTokenizer)


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    vocabularies.huggingface(vocabularies.KINDS[0]).save_pretrained(folder)
    cache.write_text("a file")
    for _ in range(2):
        assert open_tokenizer(folder, cache).encode("x")
    assert cache.read_text() == "a file"


def test_disk_without_room_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError("No space left on device")

    folder, cache = tmp_path / "model", tmp_path / "cache"
    vocabularies.huggingface(vocabularies.KINDS[0]).save_pretrained(folder)
    monkeypatch.setattr("opsin.processing.kept_tokenizer.os.replace", refuse)
    assert open_tokenizer(folder, cache).encode("x")
    assert list(cache.iterdir()) == []


def test_tokenizer_with_parts_in_python_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Splitter:
        def pre_tokenize(self, text: object) -> None: ...

    folder, cache = tmp_path / "model", tmp_path / "cache"
    vocabularies.huggingface(vocabularies.KINDS[0]).save_pretrained(folder)
    opened = open_tokenizer(folder, None)
    opened.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Splitter())
    monkeypatch.setattr("opsin.processing.kept_tokenizer._from_transformers", lambda folder: opened)
    assert open_tokenizer(folder, cache) is opened
    assert not cache.exists()


def test_tokenizer_that_splits_special_tokens_does_so_at_every_start(tmp_path: Path):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    vocabularies.huggingface(vocabularies.KINDS[0]).save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "split_special_tokens": True}))
    first, again = (Tokenizer.from_folder(folder, cache=cache).encode(TEXT) for _ in range(2))
    assert again == first
    config.write_text(json.dumps({**json.loads(config.read_text()), "split_special_tokens": False}))
    assert Tokenizer.from_folder(folder, cache=cache).encode(TEXT) != first


def test_files_that_are_not_there_are_not_read(tmp_path: Path):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    vocabularies.huggingface(vocabularies.KINDS[0]).save_pretrained(folder)
    (folder / "notes.txt").symlink_to(tmp_path / "gone")
    (folder / "more.json").mkdir()
    open_tokenizer(folder, cache)
    assert isinstance(open_tokenizer(folder, cache), KeptTokenizer)


def test_few_copies_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opsin.processing.kept_tokenizer._MAX_KEPT", 2)
    folder, cache = tmp_path / "model", tmp_path / "cache"
    vocabularies.huggingface(vocabularies.KINDS[0]).save_pretrained(folder)
    for number in range(4):
        (folder / "chat_template.jinja").write_text(f"{number}")
        open_tokenizer(folder, cache)
    assert len(list(cache.iterdir())) == 2
    assert isinstance(open_tokenizer(folder, cache), KeptTokenizer)


def test_kept_copy_is_opened_without_torch_and_transformers(tmp_path: Path):
    folder = tmp_path / "model"
    vocabularies.huggingface(vocabularies.KINDS[0]).save_pretrained(folder)
    code = (
        "import sys; from pathlib import Path; from opsin.processing.tokenizer import Tokenizer;"
        f"Tokenizer.from_folder(Path({str(folder)!r}), cache=Path({str(tmp_path / 'cache')!r}));"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for _ in range(2)
    ]  # fmt: skip
    assert told == ["['torch', 'transformers']", "[]"]


def test_error_of_a_folder_without_tokenizer_is_not_told_as_one_of_the_cache(tmp_path: Path):
    (tmp_path / "model").mkdir()
    with pytest.raises((OSError, ValueError)) as raised:
        open_tokenizer(tmp_path / "model", tmp_path / "cache")
    told: BaseException | None = raised.value
    while told is not None:
        assert str(tmp_path / "cache") not in str(told)
        told = told.__context__


def test_folder_without_a_tokenizer_is_told_of(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ConfigError, match=r"tokenizer\.json and tokenizer_config\.json belong there"):
        open_tokenizer(tmp_path, None)
