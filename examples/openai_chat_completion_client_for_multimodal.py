"""Ask a served vision-language model through OpenAI's Python client.

Start a server first, in another terminal:

    opsin serve demo

then

    pip install openai
    python examples/openai_chat_completion_client_for_multimodal.py                       # all kinds of question
    python examples/openai_chat_completion_client_for_multimodal.py single-image --image cat.jpg
    python examples/openai_chat_completion_client_for_multimodal.py multi-image --image a.jpg --image https://host/b.jpg
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI

PICTURES = Path(__file__).resolve().parents[1] / "src" / "opsin" / "demo" / "pictures"


def picture_part(source: str) -> dict[str, Any]:
    """A picture by URL, which the server fetches, or by path, whose bytes go along as base64."""
    if not source.startswith(("http:", "https:", "data:")):
        data = base64.b64encode(Path(source).read_bytes()).decode("ascii")
        source = f"data:image/png;base64,{data}"  # the server looks at the bytes, not at this type
    return {"type": "image_url", "image_url": {"url": source}}


def ask(client: OpenAI, model: str, question: str, pictures: Sequence[str] = (), *, stream: bool = False) -> None:
    """Print one question and its answer."""
    content: list[Any] = [*map(picture_part, pictures), {"type": "text", "text": question}]
    messages: Any = [{"role": "user", "content": content}]
    print(f"{question} ", end="", flush=True)
    if stream:
        for chunk in client.chat.completions.create(
            model=model, messages=messages, max_completion_tokens=64, temperature=0, stream=True
        ):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    else:
        answer = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=64, temperature=0)
        print(answer.choices[0].message.content)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a served vision-language model.")
    parser.add_argument(
        "kind", nargs="?", choices=("text-only", "single-image", "multi-image", "stream", "all"), default="all"
    )
    parser.add_argument("--image", action="append", help="path or URL; again for another")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="EMPTY")
    args = parser.parse_args(argv)

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    pictures = args.image or sorted(str(path) for path in PICTURES.glob("*.png"))[:2]
    if args.kind in ("text-only", "all"):
        ask(client, model, "What is the capital of France?")
    if args.kind in ("single-image", "all"):
        ask(client, model, "What is in the picture?", pictures[:1])
    if args.kind in ("multi-image", "all"):
        ask(client, model, "Which picture has more animals?", pictures)
    if args.kind in ("stream", "all"):
        ask(client, model, "What is in the picture?", pictures[-1:], stream=True)


if __name__ == "__main__":
    main()
