"""Pictures over HTTP: what is refused and how, and that fetching stalls nobody."""

from __future__ import annotations

import base64
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

from opsin import AsyncLLM
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.engine.conftest import picture
from tests.server.conftest import NAME, assert_idle, chat, data_url, serving
from tests.server.hosts import PictureHost

if TYPE_CHECKING:
    from tests.factory import LlavaShape

URL = "/v1/chat/completions"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def as_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 2.5 gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def host() -> Iterator[PictureHost]:
    with PictureHost(png(1)).running() as host:
        yield host


@pytest.fixture(scope="module")
def open_engine(tiny_llava: Callable[[LlavaShape], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine that may fetch from loopback and from one folder, at most two pictures per prompt."""
    from tests.factory import LlavaShape

    folder = tmp_path_factory.mktemp("allowed")
    (folder / "picture.png").write_bytes(png(1))
    (folder / "link.png").symlink_to("/etc/hostname")
    with AsyncLLM(
        str(tiny_llava(LlavaShape(num_kv_heads=2))),
        media_workers=1,
        allow_private_media_hosts=True,
        allowed_local_media_path=str(folder),
        image_fetch_timeout_s=3,
        max_request_pixels=10_000,
        max_request_media_bytes=40_000,
        limit_mm_per_prompt={"image": 2},
    ) as engine:
        yield engine, folder


@pytest.fixture
def open_app(open_engine: tuple[AsyncLLM, Path]) -> FastAPI:
    return create_app(open_engine[0], ServerConfig(), model=NAME)


@pytest.fixture
def open_client(open_app: FastAPI, open_engine: tuple[AsyncLLM, Path]) -> Iterator[httpx.Client]:
    with serving(open_app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        yield client
    assert_idle(open_app, open_engine[0])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,%%%", "invalid_base64_image"),
        ("data:image/png;base64,", "empty_image_file"),
        ("data:image/png;base64", "invalid_image_url"),
        (as_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "invalid_image_format"),
        (as_url(b"%PDF-1.7\n"), "invalid_image_format"),
        (as_url(b"<!doctype html><html></html>"), "invalid_image_format"),
        (as_url(b"SIMPLE  =                    T"), "invalid_image_format"),
        (as_url(png(1)[:200]), "image_parse_error"),
        (as_url(bomb()), "image_too_large"),
        ("http://127.0.0.1:9/x.png", "invalid_image_url"),
        ("http://[::ffff:127.0.0.1]/x.png", "invalid_image_url"),
        ("http://169.254.169.254/latest/meta-data", "invalid_image_url"),
        ("http://2130706433/x.png", "invalid_image_url"),
        ("http://10.0.0.1\\@example.com/x.png", "invalid_image_url"),
        ("http://user:pw@example.com/x.png", "invalid_image_url"),
        ("http://a\r\nb/x.png", "invalid_image_url"),
        ("ftp://example.com/x.png", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unusable_picture_is_refused_by_code_and_path(client: httpx.Client, url: str, code: str, stream: bool):
    response = client.post(URL, json=chat(1, part(url), "What?", stream=stream))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["param"] == "messages.0.content.1.image_url"
    assert "/etc" not in error["message"]
    assert client.post(URL, json=chat(1)).status_code == 200


def test_broken_picture_among_several_is_named(client: httpx.Client):
    body = chat(1, part(data_url(71)), "What?", part(as_url(png(72)[:200])), part(data_url(73)))
    error = client.post(URL, json=body).json()["error"]
    assert (error["code"], error["param"]) == ("image_parse_error", "messages.0.content.3.image_url")


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "image", "image": "/etc/passwd"},
        {"type": "image_pil", "image_pil": "/etc/passwd"},
        {"type": "image_pil", "image_pil": [[1, 2], [3, 4]]},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "image_embeds", "image_embeds": [[1.0]]},
        {"type": "image_url", "image_url": None, "uuid": "known"},
        {"type": "video_url", "video_url": {"url": data_url(1)}},
    ],
    ids=["path", "path as object", "array", "base64 tensor", "list tensor", "uuid alone", "video"],
)
def test_picture_that_http_cannot_carry_is_refused(client: httpx.Client, bad: Any):
    response = client.post(URL, json=chat(bad, "What?"))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("messages")


def test_private_host_is_never_connected_to(client: httpx.Client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        for name in ("127.0.0.1", "localhost"):
            response = client.post(URL, json=chat(part(f"http://{name}:{port}/x.png")))
            assert response.json()["error"]["code"] == "invalid_image_url"
        with pytest.raises(TimeoutError):
            listener.accept()


def test_too_many_pictures_are_refused_and_the_next_request_is_served(open_client: httpx.Client):
    response = open_client.post(URL, json=chat(1, 2, 3, "What?"))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith("At most 2 image(s) may be provided in one prompt.")
    assert error["param"] == "messages"
    assert open_client.post(URL, json=chat(1, 2, "What?")).status_code == 200


def test_pictures_too_large_together_are_refused(open_client: httpx.Client):
    def seen(*urls: str) -> httpx.Response:
        return open_client.post(URL, json=chat(*(part(url) for url in urls), "What?"))

    wide = [data_url(seed, width=80, height=80) for seed in (1, 2)]  # 6,400 pixels each
    assert seen(wide[0]).status_code == 200
    pixels = seen(*wide)
    assert (pixels.status_code, pixels.json()["error"]["code"]) == (400, "image_too_large")
    heavy = as_url(png(1) + b"\0" * 25_000)  # what follows the picture's end is not looked at
    assert seen(heavy).status_code == 200
    size = seen(heavy, heavy.replace("image/png", "image/x"))
    assert (size.status_code, size.json()["error"]["code"]) == (400, "image_file_too_large")


def test_picture_by_url_file_and_data_is_the_same(
    open_client: httpx.Client, open_engine: tuple[AsyncLLM, Path], host: PictureHost
):
    urls = [f"{host.url}/a.png", (open_engine[1] / "picture.png").as_uri(), data_url(1)]
    answers = [open_client.post(URL, json=chat(part(url), "What?")).json() for url in urls]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_link_out_of_the_allowed_folder_is_refused(open_client: httpx.Client, open_engine: tuple[AsyncLLM, Path]):
    for url in ((open_engine[1] / "link.png").as_uri(), f"file://{open_engine[1]}/../x.png"):
        response = open_client.post(URL, json=chat(part(url)))
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_image_url"


def test_missing_picture_is_the_callers_fault(open_client: httpx.Client, host: PictureHost):
    response = open_client.post(URL, json=chat(1, part(f"{host.url}/missing"), "What?"))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("failed_to_download_image", "messages.0.content.1.image_url")


def test_slow_host_costs_its_caller_one_deadline(open_client: httpx.Client, host: PictureHost):
    host.gate.clear()
    try:
        response = open_client.post(URL, json=chat(part(f"{host.url}/never"), "What?"))
    finally:
        host.gate.set()
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "failed_to_download_image"
    assert "3 s" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_client_that_leaves_while_its_picture_is_fetched_is_forgotten(
    open_client: httpx.Client, open_app: FastAPI, host: PictureHost, stream: bool
):
    host.gate.clear()
    try:
        with pytest.raises(httpx.ReadTimeout):
            open_client.post(URL, json=chat(part(f"{host.url}/left-{stream}"), stream=stream), timeout=0.3)
        deadline = time.monotonic() + 20
        while open_app.state.server.admission.num_admitted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        host.gate.set()


def test_slow_host_stalls_nobody_else(open_client: httpx.Client, host: PictureHost):
    host.gate.clear()
    hits = host.num_hits
    slow: list[httpx.Response] = []
    body = chat(part(f"{host.url}/slow.png"), "What?")
    waiting = threading.Thread(target=lambda: slow.append(open_client.post(URL, json=body)))
    waiting.start()
    try:
        while host.num_hits == hits:
            time.sleep(0.001)
        for _ in range(3):  # the host is still silent
            assert open_client.post(URL, json=chat(2, "What?", max_tokens=32)).status_code == 200
        assert not slow
    finally:
        host.gate.set()
        waiting.join(30)
    assert slow[0].status_code == 200
