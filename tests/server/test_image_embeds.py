"""Pictures as features over HTTP: what vLLM's clients send, and safer files."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import safetensors.torch
import torch

from opsin import AsyncLLM, SamplingParams
from opsin.media.ops import make_tiles
from opsin.media.source import EncodedPicture
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.server.conftest import NAME, chat, run_async, serving, user

URL = "/v1/chat/completions"


def as_torch(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def as_npy(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    return buffer.getvalue()


def as_safetensors(tensor: torch.Tensor) -> bytes:
    return safetensors.torch.save({"image_embeds": tensor.contiguous()})


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def part(embeds: Any) -> dict[str, Any]:
    return {"type": "image_embeds", "image_embeds": embeds}


@pytest.fixture(scope="module")
def features(engine: AsyncLLM) -> torch.Tensor:
    """What the model's own tower makes of picture 1: (features, width)."""
    prepared = run_async(engine.prepare_chat(user(1), SamplingParams()))
    (item,), (source,) = prepared.request.media, prepared.sources
    assert isinstance(source, EncodedPicture)
    plan = item.layout.plan
    pixels = np.empty(plan.num_bytes, np.uint8)
    make_tiles(source.decode(), plan, pixels)
    inner: Any = engine._front.engine
    model = inner.core.executor._runner.model
    with torch.inference_mode():
        encoded = model.encode([[torch.from_numpy(pixels).view(*plan.tile_sizes[0], 3)]], [item.layout])
    return encoded.clone()


@pytest.mark.parametrize("write", [as_torch, as_npy, as_safetensors])
def test_features_of_a_picture_give_its_answer(
    client: httpx.Client, address: str, features: torch.Tensor, write: Callable[[torch.Tensor], bytes]
):
    whole = client.post(URL, json=chat(1, "What is this?")).json()
    file = base64_of(write(features))
    given: list[Any] = [file, f"data:application/octet-stream;base64,{file}", {"image_embeds": file}]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as sdk:
        for embeds in given:
            body = chat(part(embeds), "What is this?")
            answer = sdk.chat.completions.create(
                model=NAME, messages=body["messages"], temperature=0, max_tokens=8, extra_body={"ignore_eos": True}
            )
            assert answer.choices[0].message.content == whole["choices"][0]["message"]["content"]
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == whole["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("embeds", "code", "message"),
    [
        ("!!!", "invalid_base64_image", "not valid base64"),
        ("AAAA", "invalid_image_format", "Send base64 of a safetensors file"),
        (base64_of(as_torch(torch.zeros(16, 3))), None, "have 3 values per row"),
        (base64_of(as_torch(torch.full((16, 64), float("nan")))), None, "not finite"),
        (base64_of(as_torch(torch.zeros(2, 16, 64))), None, "must have shape"),
        (
            {"image_embeds": base64_of(as_torch(torch.zeros(2, 16, 64)))},
            None,
            "features of one picture; this one has 2",
        ),
        ({"image_embeds": base64_of(as_torch(torch.zeros(16, 64))), "unheard": 1}, None, "unknown unheard"),
        ({"image_embeds": base64_of(as_torch(torch.zeros(16, 64))), "image_grid_thw": [[1, 4, 4]]}, None, "come alone"),
        ({}, None, "no 'image_embeds'"),
        ([[1.0]], None, "must be a torch tensor"),
    ],
)
def test_features_that_do_not_fit_are_refused(client: httpx.Client, embeds: Any, code: str | None, message: str):
    response = client.post(URL, json=chat(part(embeds), "What?"))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["code"] == code
    assert error["param"].startswith("messages")


def test_features_count_among_a_requests_bytes(tiny_llava: Any, features: torch.Tensor):
    from tests.factory import LlavaShape

    num_bytes = features.numel() * features.element_size()
    folder = str(tiny_llava(LlavaShape(num_kv_heads=2)))
    with AsyncLLM(folder, media_workers=1, max_request_media_bytes=2 * num_bytes - 1) as engine:
        app = create_app(engine, ServerConfig(), model=NAME)
        with serving(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            one = part(base64_of(as_torch(features)))
            assert client.post(URL, json=chat(one, "What?")).status_code == 200
            response = client.post(URL, json=chat(one, one, "What?"))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "image_file_too_large"
