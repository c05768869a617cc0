"""Videos over HTTP: conversations and embeddings with ``video_url``, and files that are not what they seem."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from opsin import AsyncLLM
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.factories.qwen2_vl import Qwen2VLShape, write_qwen2_vl
from tests.media import clips
from tests.server.conftest import NAME, assert_idle, chat, serving
from tests.server.hosts import PictureHost

URL = "/v1/chat/completions"
CLIP = clips.encode(clips.frames(6))
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif p['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "clip.mp4").write_bytes(CLIP)
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[AsyncLLM]:
    model = write_qwen2_vl(tmp_path_factory.mktemp("qwen"), Qwen2VLShape(max_pixels=8 * 256))
    settings: dict[str, Any] = {"allowed_local_media_path": str(folder), "allow_private_media_hosts": True}
    with AsyncLLM(
        str(model), chat_template=TEMPLATE, media_workers=1, media_decode_timeout_s=5.0, **settings
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine: AsyncLLM) -> FastAPI:
    return create_app(engine, ServerConfig(served_model_name=(NAME,)), model="root")


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as address:
        yield address


@pytest.fixture
def client(address: str, app: FastAPI, engine: AsyncLLM) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        yield client
    assert_idle(app, engine)


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def answer(client: httpx.Client, *parts: Any, **fields: Any) -> dict[str, Any]:
    response = client.post(URL, json=chat(*parts, **fields))
    assert response.status_code == 200, response.text
    return response.json()


def jpegs(pictures: list[Image.Image]) -> str:
    frames: list[str] = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG")
        frames.append(base64.b64encode(buffer.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(frames)


def test_video_answers_alike_from_a_data_url_a_file_and_a_host(client: httpx.Client, folder: Path) -> None:
    with PictureHost(CLIP).running() as host:
        urls = [data_url(CLIP), data_url(CLIP, "application/octet-stream")]
        urls += [f"file://{folder}/clip.mp4", f"{host.url}/clip.mp4"]
        bodies = [answer(client, part(url), "What happens?") for url in urls]
    assert len({body["choices"][0]["message"]["content"] for body in bodies}) == 1
    assert {body["usage"]["prompt_tokens"] for body in bodies} == {bodies[0]["usage"]["prompt_tokens"]}


def test_request_says_how_many_frames_to_take(client: httpx.Client) -> None:
    def tokens(**fields: Any) -> int:
        return answer(client, part(data_url(CLIP)), "What happens?", **fields)["usage"]["prompt_tokens"]

    whole, two, four = tokens(), *(tokens(media_io_kwargs={"video": {"num_frames": n}}) for n in (2, 4))
    assert whole - four == four - two > 0  # two frames are one step
    assert tokens(mm_processor_kwargs={"num_frames": 4}) == four
    refused = client.post(URL, json=chat(part(data_url(CLIP)), "?", media_io_kwargs={"video": {"frames": 2}}))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "media_io_kwargs")


def test_frames_sent_as_jpegs_are_a_video(client: httpx.Client) -> None:
    five, six = (answer(client, part(jpegs(clips.frames(n))), "What happens?")["usage"] for n in (5, 6))
    assert five["prompt_tokens"] == six["prompt_tokens"]
    assert answer(client, part(jpegs(clips.frames(4))), "What?")["usage"]["prompt_tokens"] < six["prompt_tokens"]


def test_embedding_of_a_video(client: httpx.Client) -> None:
    def vector(data: bytes) -> list[float]:
        content = [part(data_url(data)), {"type": "text", "text": "Represent it."}]
        body = {"model": NAME, "messages": [{"role": "user", "content": content}], "encoding_format": "float"}
        response = client.post("/v1/embeddings", json=body)
        assert response.status_code == 200, response.text
        return response.json()["data"][0]["embedding"]

    assert vector(CLIP) == pytest.approx(vector(CLIP))
    assert vector(CLIP) != pytest.approx(vector(clips.encode(clips.frames(6, seed=4))), abs=1e-3)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (data_url(CLIP[:-300]), "video_parse_error"),
        (data_url(clips.header_first(CLIP)[:-300]), "video_parse_error"),
        (data_url(b""), "empty_video_file"),
        (data_url(b"#EXTM3U\nfile:///etc/passwd\n"), "invalid_video_format"),
        (data_url(b"\xff\xd8\xff" + bytes(40)), "invalid_video_format"),
        ("data:video/mp4;base64,?!", "invalid_base64_video"),
        ("data:video/jpeg;base64,AAAA,?!", "invalid_base64_video"),
        ("data:video/jpeg;base64," + ",".join(["AAAA"] * 800), "video_too_large"),
        ("data:video/jpeg;base64,AAAA", "invalid_image_format"),
        ("file:///etc/passwd", "invalid_video_url"),
        ("/etc/passwd", "invalid_video_url"),
        ("http://user:pw@example.com/x.mp4", "invalid_video_url"),
    ],
)
def test_video_that_cannot_be_used_is_a_client_s_fault(client: httpx.Client, url: str, code: str) -> None:
    response = client.post(URL, json=chat(part(url), "What happens?"))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, "messages.0.content.0.video_url")
    assert "/etc" not in error["message"]
    assert answer(client, part(data_url(CLIP)), "What happens?")


@pytest.mark.parametrize(
    "video", [["/etc/passwd", "/etc/hostname"], [["/etc/passwd"], {}], [[1, 2], [3, 4]], {"path": "/etc/passwd"}, 3]
)
def test_video_that_http_cannot_carry_is_refused(client: httpx.Client, video: Any) -> None:
    response = client.post(URL, json=chat({"type": "video", "video": video}, "What happens?"))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("messages")
    assert "root:" not in response.text
