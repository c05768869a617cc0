"""An input processor for the tiny LLaVA checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from opsin.config import MediaConfig
from opsin.models.hub import find_model
from opsin.models.llava.rule import LlavaRule
from opsin.processing.processor import InputProcessor
from opsin.processing.tokenizer import Tokenizer
from opsin.types import ModelSpec
from tests.factory import VOCAB_SIZE, LlavaShape

MAX_MODEL_LEN = 200
SPEC = ModelSpec(
    architecture="LlavaForConditionalGeneration",
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    feature_width=64,
    max_position=512,
    layers=(),
)


@pytest.fixture(scope="session")
def folder(tiny_llava: Callable[[LlavaShape], Path]) -> Path:
    return tiny_llava(LlavaShape())


@pytest.fixture(scope="session")
def make_processor(folder: Path) -> Callable[..., InputProcessor]:
    files = find_model(str(folder))
    tokenizer = Tokenizer.from_folder(folder, files.generation_config)
    rule = LlavaRule.from_hf(files.config, files.processor, tokenizer)

    def make(**changes: object) -> InputProcessor:
        settings = {"media": MediaConfig(), "max_model_len": MAX_MODEL_LEN, "folder": folder, **changes}
        return InputProcessor(tokenizer, rule, SPEC, **settings)  # pyright: ignore[reportArgumentType]

    return make


@pytest.fixture(scope="session")
def processor(make_processor: Callable[..., InputProcessor]) -> InputProcessor:
    return make_processor(media=MediaConfig(limit_mm_per_prompt={"image": 4}))


@pytest.fixture(scope="session")
def red() -> Image.Image:
    return Image.new("RGB", (40, 30), "red")
