"""Ask vision-language models about several pictures at once, with ``generate`` or with ``chat``.

    python examples/offline_inference_vision_language_multi_image.py                          # Phi-3.5-vision
    python examples/offline_inference_vision_language_multi_image.py -m qwen2_vl --method chat a.jpg https://host/b.jpg

``generate`` takes a prompt in the model's own format, one placeholder per picture; ``chat`` takes OpenAI's messages
and writes that prompt itself.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opsin import LLM, SamplingParams
from opsin.multimodal.utils import fetch_image

PICTURES = Path(__file__).resolve().parents[1] / "src" / "opsin" / "demo" / "pictures"
QUESTION = "What is the content of each image?"


class Model(NamedTuple):
    """A checkpoint and how it wants to be asked.

    Attributes:
        prompt: with {images} where the placeholders belong, and {question}.
        image: one placeholder, with {n} where the model numbers its pictures from 1.
        settings: of the engine, for this checkpoint.
    """

    checkpoint: str
    prompt: str
    image: str
    settings: Mapping[str, Any] = {}


CHATML = "<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n"
GLM = "[gMASK]<sop><|user|>\n{images}{question}<|assistant|>\n"

MODELS = {
    "gemma3": Model(
        "google/gemma-3-4b-it",
        "<bos><start_of_turn>user\n{images}{question}<end_of_turn>\n<start_of_turn>model\n",
        "<start_of_image>",
    ),
    "glm4_1v": Model("zai-org/GLM-4.1V-9B-Thinking", GLM, "<|begin_of_image|><|image|><|end_of_image|>"),
    "glm4_6v": Model("zai-org/GLM-4.6V-Flash", GLM, "<|begin_of_image|><|image|><|end_of_image|>"),
    "idefics3": Model(
        "HuggingFaceM4/Idefics3-8B-Llama3",
        "<|begin_of_text|>User:{images}{question}<end_of_utterance>\nAssistant:",
        "Image-{n}: <image>\n",
    ),
    "internvl": Model("OpenGVLab/InternVL3-1B-hf", CHATML, "Image-{n}: <IMG_CONTEXT>\n"),
    "llava-onevision": Model("llava-hf/llava-onevision-qwen2-7b-ov-hf", CHATML, "<image>\n"),
    "minicpmv": Model("openbmb/MiniCPM-V-2_6", CHATML, "(<image>./</image>)\n"),
    "mistral3": Model("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "<s>[INST]{question}\n{images}[/INST]", "[IMG]"),
    "phi3_v": Model(
        "microsoft/Phi-3.5-vision-instruct",
        "<|user|>\n{images}{question}<|end|>\n<|assistant|>\n",
        "<|image_{n}|>\n",
        {"max_model_len": 4096, "mm_processor_kwargs": {"num_crops": 4}},
    ),
    "pixtral_hf": Model("mistral-community/pixtral-12b", "<s>[INST]{question}\n{images}[/INST]", "[IMG]"),
    "qwen2_5_vl": Model(
        "Qwen/Qwen2.5-VL-3B-Instruct", CHATML, "Picture {n}: <|vision_start|><|image_pad|><|vision_end|>"
    ),
    "qwen2_vl": Model("Qwen/Qwen2-VL-7B-Instruct", CHATML, "Picture {n}: <|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": Model("Qwen/Qwen3-VL-4B-Instruct", CHATML, "Picture {n}: <|vision_start|><|image_pad|><|vision_end|>"),
    "smolvlm": Model(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "<|im_start|>User:{images}{question}<end_of_utterance>\nAssistant:",
        "Image-{n}: <image>\n",
    ),
}


def as_url(source: str) -> str:
    """A path's bytes as a data: URL; URLs as they are."""
    if source.startswith(("http:", "https:", "data:")):
        return source
    return "data:image/png;base64," + base64.b64encode(Path(source).read_bytes()).decode("ascii")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a vision-language model about several pictures at once.")
    parser.add_argument("images", nargs="*", help="paths or URLs")
    parser.add_argument("-m", "--model-type", choices=sorted(MODELS), default="phi3_v")
    parser.add_argument("--method", choices=("generate", "chat"), default="generate")
    parser.add_argument("--model", help="checkpoint of that type: Hugging Face id or folder")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args(argv)

    model = MODELS[args.model_type]
    urls = [as_url(source) for source in args.images or sorted(map(str, PICTURES.glob("*.png")))[:2]]
    settings = dict(model.settings) if args.model is None else {}
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)

    with LLM(model=args.model or model.checkpoint, limit_mm_per_prompt={"image": len(urls)}, **settings) as llm:
        if args.method == "generate":
            signs = "".join(model.image.format(n=n) for n in range(1, len(urls) + 1))
            prompt = model.prompt.format(images=signs, question=QUESTION)
            pictures = [fetch_image(url) for url in urls]
            outputs = llm.generate({"prompt": prompt, "multi_modal_data": {"image": pictures}}, params)
        else:
            content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            outputs = llm.chat([{"role": "user", "content": [{"type": "text", "text": QUESTION}, *content]}], params)
    for output in outputs:
        print(output.outputs[0].text)


if __name__ == "__main__":
    main()
