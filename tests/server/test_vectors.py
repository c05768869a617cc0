"""Vectors in all the ways in which they may be sent."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from starlette.responses import Response

from opsin.server import vectors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def numbers(data: bytes, dtype: str, order: str) -> np.ndarray:
    """What bytes hold, as torch reads them."""
    width = 4 if dtype == "float32" else 2
    if order == "big":
        data = np.frombuffer(data, f">u{width}").astype(f"<u{width}").tobytes()
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).float().numpy()


def expected(client: httpx.Client, path: str, body: dict[str, Any], dtype: str) -> list[np.ndarray]:
    name = "embedding" if "embeddings" in path else "data"
    rows = [np.array(item[name], np.float32) for item in client.post(path, json=body).json()["data"]]
    return [torch.from_numpy(row).to(DTYPES[dtype]).float().numpy() for row in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["native", "little", "big"])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
def test_bytes_are_the_vectors_and_the_header_tells_of_them(
    client: httpx.Client, path: str, dtype: str, order: str
) -> None:
    body = {"input": ["One", "Two and more"]}
    rows = expected(client, path, body, dtype)
    asked = {**body, "encoding_format": "bytes", "embed_dtype": dtype, "endianness": order}
    answer = client.post(path, json=asked)
    assert answer.headers["content-type"] == "application/octet-stream"
    told = json.loads(answer.headers["metadata"])
    assert told["usage"]["prompt_tokens"] > 0
    end = 0
    for i, (item, row) in enumerate(zip(told["data"], rows, strict=True)):
        assert (item["index"], item["start"], item["embed_dtype"]) == (i, end, dtype)
        assert order in ("native", item["endianness"])
        end = item["end"]
        found = numbers(answer.content[item["start"] : end], dtype, item["endianness"]).reshape(item["shape"])
        np.testing.assert_array_equal(found, row)
    assert end == len(answer.content)
    alone = client.post(path, json={**asked, "encoding_format": "bytes_only"})
    assert (alone.content, alone.headers.get("metadata")) == (answer.content, None)


def test_base64_may_hold_half_precision(client: httpx.Client) -> None:
    body = {"input": "One"}
    (row,) = expected(client, "/v1/embeddings", body, "bfloat16")
    asked = {**body, "encoding_format": "base64", "embed_dtype": "bfloat16", "endianness": "big"}
    (item,) = client.post("/v1/embeddings", json=asked).json()["data"]
    np.testing.assert_array_equal(numbers(base64.b64decode(item["embedding"]), "bfloat16", "big"), row)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"embed_dtype": "fp8_e4m3"}, "embed_dtype"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"endianness": "middle"}, "endianness"),
        ({"encoding_format": "bytes", "input": [[1]] * 513}, "encoding_format"),
    ],
)
def test_form_that_is_not_had_is_refused(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/embeddings", json={"input": "One", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
def test_vectors_are_written_beside_the_event_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    write = vectors.json_response

    def write_beside(body: Any) -> Response:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return write(body)

    monkeypatch.setattr(vectors, "json_response", write_beside)
    for form in ("float", "base64"):
        assert client.post(path, json={"input": "One", "encoding_format": form}).status_code == 200
