"""data: and file: URLs to bytes: what is decoded, what is read, and what is refused."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from opsin.config import MediaConfig
from opsin.errors import MediaError
from opsin.media import fetch as fetch_module
from opsin.media.fetch import decode_data_url, fetch

BODY = bytes(range(256)) * 20
PUBLIC = MediaConfig()
SMALL = MediaConfig(max_media_bytes=100_000)


def code_of(url: str, config: MediaConfig) -> str | None:
    with pytest.raises(MediaError) as caught:
        fetch(url, config)
    return caught.value.code


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:image/png;base64," + base64.b64encode(BODY).decode(), BODY),
        ("DATA:;BASE64,QUJD", b"ABC"),
        ("data:text/html;charset=x;base64,QUI=", b"AB"),
        ("data:image/png;base64,QUI", b"AB"),
        ("data:image/png;base64,QU\r\nJD\n", b"ABC"),
        ("data:image/png;base64,QUI%3D", b"AB"),
        ("data:image/png;base64,%2B%2F%2B%2F", b"\xfb\xff\xbf"),
        ("data:image/png,%00A%ff", b"\0A\xff"),
        ("data:,", b""),
        ("data:;base64,QUI%3d%0A%0d%20", b"AB"),
        ("data:;base64,QUI=" + " =" * 300_000, b"AB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_data_url_is_decoded_whatever_its_type(url: str, expected: bytes) -> None:
    assert fetch(url, PUBLIC) == expected


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,QUJD!", "invalid_base64_image"),
        ("data:image/png;base64,QUJDR", "invalid_base64_image"),
        ("data:image/png;base64,QQ==QQ==", "invalid_base64_image"),
        ("data:image/png;base64,ä", "invalid_base64_image"),
        ("data:image/png;base64,%51UJD", "invalid_base64_image"),  # nobody escapes letters
        ("data:image/png;base64," + "%41" * 100_000, "invalid_base64_image"),
        ("data:image/png;base64", "invalid_image_url"),
        ("data:image/png;base64," + "A" * 140_000, "image_file_too_large"),
        ("data:image/png;base64," + "A" * 500_000, "image_file_too_large"),
        ("data:," + "A" * 100_001, "image_file_too_large"),
    ],
    ids=lambda value: value[:32],
)
def test_bad_data_url_fails_with_code(url: str, code: str) -> None:
    assert code_of(url, SMALL) == code


def test_bytes_sent_as_so_many_percents_are_refused_unread() -> None:
    with pytest.raises(MediaError, match="Send it as base64") as refusal:
        fetch("data:image/png," + "%41" * 400_000, MediaConfig())
    assert refusal.value.code == "invalid_image_url"
    assert fetch("data:image/png," + "%41" * 300_000, MediaConfig()) == b"A" * 300_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "a b.png").write_bytes(BODY)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "x").write_bytes(b"secret")
    (allowed / "escape").symlink_to(tmp_path / "secret")
    (allowed / "inside").symlink_to(allowed / "a b.png")
    (allowed / "loop").symlink_to(allowed / "loop")
    os.mkfifo(allowed / "pipe")
    return allowed


def test_file_url_inside_the_allowed_folder_is_read(folder: Path) -> None:
    config = MediaConfig(allowed_local_media_path=str(folder))
    assert fetch((folder / "a b.png").as_uri(), config) == BODY
    assert fetch(f"file://localhost{folder}/inside", config) == BODY


@pytest.mark.parametrize(
    "path",
    [
        "escape",
        "../secret",
        "%2e%2e/secret",
        "../allowed-not/x",
        "missing",
        "loop",
        "pipe",
        ".",
        "a%00b",
    ],
)
def test_file_url_to_anything_else_is_refused(folder: Path, path: str) -> None:
    config = MediaConfig(allowed_local_media_path=str(folder))
    assert code_of(f"file://{folder}/{path}", config) == "invalid_image_url"


def test_file_url_is_refused_where_no_folder_is_allowed_or_it_names_a_host(folder: Path) -> None:
    url = (folder / "a b.png").as_uri()
    assert code_of(url, PUBLIC) == "invalid_image_url"
    config = MediaConfig(allowed_local_media_path=str(folder))
    assert code_of(url.replace("file://", "file://elsewhere"), config) == "invalid_image_url"


def test_file_larger_than_the_limit_is_refused(folder: Path) -> None:
    config = MediaConfig(allowed_local_media_path=str(folder), max_media_bytes=len(BODY) - 1)
    assert code_of((folder / "a b.png").as_uri(), config) == "image_file_too_large"


@pytest.mark.parametrize("wrap", [0, 1, 3, 5, 76])
def test_base64_in_pieces_is_base64_whole(wrap: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch_module, "_BASE64_CHARS", 8)
    for size in range(40):
        data = bytes(range(size))
        text = base64.b64encode(data).decode()
        lines = [text[i : i + wrap] for i in range(0, len(text), wrap)] if wrap else [text]
        for form in ("\r\n".join(lines), text.rstrip("=")):
            assert decode_data_url(f"data:;base64,{form}", 100) == data


@pytest.mark.parametrize("text", ["QUJD=QUJD", "QUI=QUI=", "Q", "QUJDQ", "QUJD!UJD", "=QUJ", "QUJDQUJ=D"])
def test_what_is_no_base64_is_none_in_pieces_either(text: str, monkeypatch: pytest.MonkeyPatch):
    for chars in (4, 8, 2**18):
        monkeypatch.setattr(fetch_module, "_BASE64_CHARS", chars)
        with pytest.raises(MediaError) as refusal:
            decode_data_url(f"data:;base64,{text}", 100)
        assert refusal.value.code == "invalid_base64_image"
