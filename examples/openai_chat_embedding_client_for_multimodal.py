"""Turn pictures and questions into vectors over HTTP, with the models that want their messages in a form of their own.

Start a server first, in another terminal:

    opsin serve TIGER-Lab/VLM2Vec-Full --task embedding --trust-remote-code --max-model-len 4096 \\
        --chat-template examples/template_vlm2vec.jinja

or

    opsin serve MrLight/dse-qwen2-2b-mrl-v1 --task embedding --trust-remote-code --max-model-len 8192 \\
        --chat-template examples/template_dse_qwen2_vl.jinja

then

    pip install requests pillow
    python examples/openai_chat_embedding_client_for_multimodal.py vlm2vec
    python examples/openai_chat_embedding_client_for_multimodal.py dse_qwen2_vl --dimensions 512
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from PIL import Image

PICTURE = Path(__file__).resolve().parents[1] / "src" / "opsin" / "demo" / "pictures" / "lunch.jpg"


def as_url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")  # the server looks at the bytes


def message(url: str, text: str) -> list[dict[str, Any]]:
    """A conversation of one picture and one text."""
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


def blank_picture() -> str:
    """What DSE-Qwen2 was shown where a query has no picture: the smallest one that its processor leaves as it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56)).save(buffer, "png")
    return as_url(buffer.getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a served embedding model for vectors.")
    parser.add_argument("model", choices=("vlm2vec", "dse_qwen2_vl"), help="whose form of message to send")
    parser.add_argument("--image", help="path or URL of a picture")
    parser.add_argument("--query", default="What is the weather like today?", help="dse_qwen2_vl: text to search with")
    parser.add_argument("--dimensions", type=int, help="cut the vectors (dse_qwen2_vl: 1536 is all of them)")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="EMPTY")
    args = parser.parse_args(argv)
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {args.api_key}"

    def embed(messages: list[dict[str, Any]]) -> list[float]:
        """One vector. OpenAI's client knows no ``messages`` here, so the request is posted as it is."""
        body = {"model": served, "messages": messages, "encoding_format": "float", "dimensions": args.dimensions}
        response = session.post(f"{args.base_url}/embeddings", json=body)
        response.raise_for_status()
        return response.json()["data"][0]["embedding"]

    listed = session.get(f"{args.base_url}/models")
    listed.raise_for_status()
    served = listed.json()["data"][0]["id"]
    source = args.image or str(PICTURE)
    url = source if source.startswith(("http:", "https:", "data:")) else as_url(Path(source).read_bytes())

    if args.model == "vlm2vec":
        print("Picture:", embed(message(url, "Represent the given image.")))
        return
    document = embed(message(url, "What is shown in this image?"))
    query = embed(message(blank_picture(), f"Query: {args.query}"))
    print("Picture:", document)
    print("Query:", query)
    print("Similarity:", sum(a * b for a, b in zip(document, query, strict=True)))


if __name__ == "__main__":
    main()
