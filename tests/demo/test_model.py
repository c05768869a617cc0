"""The shipped folder: it loads in transformers, its template and tokenizer fit the training format, and it is right."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from PIL import Image

import opsin.demo
from opsin.demo.evaluate import Example, TransformersBackend, examples_of

PACKAGE = Path(opsin.demo.__file__).parent
FOLDER = PACKAGE / "model"
PICTURES = PACKAGE / "pictures"


@pytest.fixture(scope="module")
def backend() -> TransformersBackend:
    return TransformersBackend("demo")


def ask(backend: TransformersBackend, question: str, *names: str) -> str:
    pictures = []
    for name in names:
        with Image.open(PICTURES / name) as picture:
            pictures.append(picture.convert("RGB"))
    return backend.answer([Example(group="", question=question, answer="", pictures=tuple(pictures))])[0]


def test_weights_fit_the_package() -> None:
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 16_000_000
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}


def test_pictures_are_small() -> None:
    assert all(path.stat().st_size <= 60_000 for path in PICTURES.iterdir())


def test_folder_loads_as_llava(backend: TransformersBackend) -> None:
    assert type(backend.model).__name__ == "LlavaForConditionalGeneration"
    assert type(backend.processor).__name__ == "LlavaProcessor"
    config = backend.model.config
    assert config.image_token_id == backend.processor.tokenizer.convert_tokens_to_ids("<image>")


def test_processor_keeps_the_whole_picture(backend: TransformersBackend) -> None:
    inputs = backend.processor(text="<image>", images=Image.new("RGB", (300, 90)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)
    assert int((inputs["input_ids"] == backend.model.config.image_token_id).sum()) == 256


@pytest.mark.parametrize("text", ["Where is the red circle?", 'the word "hello"', "naïve 東京 🙂", "  two  spaces\n"])
def test_tokenizer_gives_any_text_back(backend: TransformersBackend, text: str) -> None:
    tokenizer = backend.processor.tokenizer
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_template_renders_the_training_format(backend: TransformersBackend) -> None:
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Are they the same?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        {"role": "user", "content": "Why?"},
    ]
    text = backend.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "USER: <image>\n<image>\nAre they the same? ASSISTANT:no</s>USER: Why? ASSISTANT:"


def test_template_puts_pictures_before_the_text_wherever_they_stand(backend: TransformersBackend) -> None:
    """Clients of OpenAI's API usually send the question first; the model was trained on the picture first."""
    content = [{"type": "text", "text": "What is"}, {"type": "image"}, {"type": "text", "text": "this?"}]
    text = backend.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.mark.parametrize(
    ("question", "pictures", "answer"),
    [
        ("What is in the picture?", ["animals.png"], "a dog, an elephant and a penguin"),
        ("Where is the penguin?", ["animals.png"], "bottom"),
        ("Is there a cat?", ["animals.png"], "no"),
        ("What do you see at the bottom left?", ["lunch.jpg"], "coffee"),
        ("How many circles are there?", ["shapes.png"], "2"),
        ("Is the triangle below the star?", ["shapes.png"], "yes"),
        ("What does it say?", ["sign.png"], "OPSIN"),
        ("What color is the text?", ["sign.png"], "blue"),
        ("Which picture has more animals?", ["shapes.png", "animals.png"], "the second"),
        ("Are they the same?", ["shapes.png", "animals.png"], "no"),
    ],
)
def test_bundled_picture_is_answered_right(
    backend: TransformersBackend, question: str, pictures: list[str], answer: str
) -> None:
    assert ask(backend, question, *pictures) == answer


def test_held_out_questions_are_mostly_answered_right(backend: TransformersBackend) -> None:
    examples = [example for kind in ("name", "color", "position", "read number") for example in examples_of(kind, 6, 7)]
    answers = backend.answer(examples)
    right = sum(example.answer == answer for example, answer in zip(examples, answers, strict=True))
    assert right >= 0.85 * len(examples)
