"""Ask vision-language models about a picture or a video, each in the prompt format that it was trained on.

    python examples/offline_inference_vision_language.py                              # LLaVA-1.5, one picture
    python examples/offline_inference_vision_language.py --modality video             # Qwen2-VL-2B, a drawn video
    python examples/offline_inference_vision_language.py -m qwen2_5_vl --modality video --video clip.mp4
    python examples/offline_inference_vision_language.py -m phi3_v --image cat.jpg --question "What colour is it?"

``--model`` names another checkpoint of the same family, in place of the one in the table below.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from opsin import LLM, SamplingParams

PICTURE = Path(__file__).resolve().parents[1] / "src" / "opsin" / "demo" / "pictures" / "lunch.jpg"
QUESTIONS = {"image": "What is the content of this image?", "video": "What happens in this video?"}
DEFAULTS = {"image": "llava", "video": "qwen2_vl"}


class Model(NamedTuple):
    """A checkpoint and how it wants to be asked.

    Attributes:
        prompt: with {media} where the picture or video belongs, and {question}.
        image: what marks a picture; likewise ``video``, None where the model takes none.
        settings: of the engine, for this checkpoint.
    """

    checkpoint: str
    prompt: str
    image: str = "<image>"
    video: str | None = None
    settings: Mapping[str, Any] = {}


CHATML = "<|im_start|>user\n{media}\n{question}<|im_end|>\n<|im_start|>assistant\n"
QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{media}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_PIXELS = {"mm_processor_kwargs": {"min_pixels": 28 * 28, "max_pixels": 1280 * 28 * 28}}
GLM = "[gMASK]<sop><|user|>\n{media}{question}<|assistant|>\n"
GLM_IMAGE, GLM_VIDEO = "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"

MODELS = {
    "gemma3": Model(
        "google/gemma-3-4b-it",
        "<bos><start_of_turn>user\n{media}{question}<end_of_turn>\n<start_of_turn>model\n",
        image="<start_of_image>",
    ),
    "glm4_1v": Model("zai-org/GLM-4.1V-9B-Thinking", GLM, image=GLM_IMAGE, video=GLM_VIDEO),
    "glm4_6v": Model("zai-org/GLM-4.6V-Flash", GLM, image=GLM_IMAGE, video=GLM_VIDEO),
    "idefics3": Model(
        "HuggingFaceM4/Idefics3-8B-Llama3",
        "<|begin_of_text|>User:{media}{question}<end_of_utterance>\nAssistant:",
        settings={"mm_processor_kwargs": {"size": {"longest_edge": 3 * 364}}},
    ),
    "internvl": Model("OpenGVLab/InternVL3-1B-hf", CHATML, image="<IMG_CONTEXT>", video="<video>"),
    "llava": Model("llava-hf/llava-1.5-7b-hf", "USER: {media}\n{question} ASSISTANT:"),
    "llava-next": Model("llava-hf/llava-v1.6-mistral-7b-hf", "[INST] {media}\n{question} [/INST]"),
    "llava-onevision": Model("llava-hf/llava-onevision-qwen2-7b-ov-hf", CHATML, video="<video>"),
    "minicpmv": Model("openbmb/MiniCPM-V-2_6", CHATML, image="(<image>./</image>)", video="(<video>./</video>)"),
    "mistral3": Model(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "<s>[INST]{question}\n{media}[/INST]", image="[IMG]"
    ),
    "paligemma": Model("google/paligemma-3b-mix-224", "{media}answer en {question}"),
    "phi3_v": Model(
        "microsoft/Phi-3.5-vision-instruct",
        "<|user|>\n{media}\n{question}<|end|>\n<|assistant|>\n",
        image="<|image_1|>",
        settings={"max_model_len": 4096, "mm_processor_kwargs": {"num_crops": 16}},
    ),
    "pixtral_hf": Model("mistral-community/pixtral-12b", "<s>[INST]{question}\n{media}[/INST]", image="[IMG]"),
    "qwen2_5_vl": Model(
        "Qwen/Qwen2.5-VL-3B-Instruct", QWEN, image="<|image_pad|>", video="<|video_pad|>", settings=QWEN_PIXELS
    ),
    "qwen2_vl": Model(
        "Qwen/Qwen2-VL-2B-Instruct", QWEN, image="<|image_pad|>", video="<|video_pad|>", settings=QWEN_PIXELS
    ),
    "qwen3_vl": Model(
        "Qwen/Qwen3-VL-4B-Instruct",
        CHATML.replace("{media}\n", "<|vision_start|>{media}<|vision_end|>"),
        image="<|image_pad|>",
        video="<|video_pad|>",
    ),
    "smolvlm": Model(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "<|im_start|>User:{media}{question}<end_of_utterance>\nAssistant:",
        video="<video>",
    ),
}


def rolling_ball(num_frames: int) -> list[Image.Image]:
    """The frames of a video, for those who have none at hand."""
    frames: list[Image.Image] = []
    for i in range(num_frames):
        frame = Image.new("RGB", (224, 224), "white")
        x = 20 + 140 * i // max(1, num_frames - 1)
        ImageDraw.Draw(frame).ellipse((x, 140, x + 44, 184), fill="red")
        frames.append(frame)
    return frames


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a vision-language model about a picture or a video.")
    parser.add_argument("-m", "--model-type", choices=sorted(MODELS), help="by default one that takes the modality")
    parser.add_argument("--modality", choices=sorted(QUESTIONS), default="image")
    parser.add_argument("--model", help="checkpoint of that type: Hugging Face id or folder")
    parser.add_argument("--image", default=str(PICTURE), help="path of a picture")
    parser.add_argument("--video", help="path of a video; a drawn one by default")
    parser.add_argument("--question")
    parser.add_argument("--num-prompts", type=int, default=4, help="how often to ask; the picture is encoded once")
    parser.add_argument("--num-frames", type=int, default=16, help="frames of the drawn video")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    model = MODELS[args.model_type or DEFAULTS[args.modality]]
    sign = model.image if args.modality == "image" else model.video
    if sign is None:
        takers = ", ".join(sorted(name for name in MODELS if MODELS[name].video))
        parser.error(f"{args.model_type} takes no videos; these do: {takers}")
    settings = dict(model.settings) if args.model is None else {}
    data: Any = Image.open(args.image) if args.modality == "image" else args.video or rolling_ball(args.num_frames)
    prompt = model.prompt.format(media=sign, question=args.question or QUESTIONS[args.modality])

    with LLM(model=args.model or model.checkpoint, **settings) as llm:
        outputs = llm.generate(
            [{"prompt": prompt, "multi_modal_data": {args.modality: data}}] * args.num_prompts,
            SamplingParams(temperature=0.2, max_tokens=args.max_tokens),
        )
    for output in outputs:
        print(output.outputs[0].text)


if __name__ == "__main__":
    main()
