"""One tiny LLaVA for the whole room, and pictures for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from opsin import LLM
    from tests.factory import LlavaShape


@pytest.fixture(scope="session")
def folder(tiny_llava: Callable[[LlavaShape], Path]) -> Path:
    from tests.factory import LlavaShape

    return tiny_llava(LlavaShape(num_kv_heads=2))


@contextlib.contextmanager
def engines_over(folder: Path) -> Iterator[Callable[..., LLM]]:
    """``make(**settings)``: an engine over a checkpoint, one for each set of settings, all shut down in the end."""
    from opsin import LLM

    made: dict[str, LLM] = {}

    def make(**settings: Any) -> LLM:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = LLM(str(folder), media_workers=0, **settings)
        return made[key]

    try:
        yield make
    finally:
        for llm in made.values():
            llm.shutdown()


@pytest.fixture(scope="session")
def make_llm(folder: Path) -> Iterator[Callable[..., LLM]]:
    """Engines over the tiny checkpoint."""
    with engines_over(folder) as make:
        yield make


@pytest.fixture
def llm(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    """The engine with default settings; whatever a test did with it, its pools must be full afterwards."""
    engine = make_llm()
    yield engine
    assert_idle(engine)


@contextlib.contextmanager
def everybody_let_in() -> Iterator[None]:
    """Requests start although those that run will soon need the room, so that some are preempted."""
    from opsin.scheduler import Scheduler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "_room_to_grow", lambda self, seq, num_blocks: 0)
        yield


def assert_idle(llm: LLM) -> None:
    """Nothing runs, waits or is held: every block and every leased byte has come back."""
    stats = llm.stats()
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "num_steps_in_flight",
        "kv_blocks_used",
        "feature_bytes_leased",
        "payload_bytes_pending",
    ):
        assert stats[name] == 0, f"{name} is {stats[name]}"


def picture(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(*seeds: int, text: str = "What is this?") -> Any:
    """A prompt about one picture per seed. Any, since tests also take it apart and bend it."""
    signs = "<image>" * len(seeds)
    return {"prompt": f"USER: {signs}\n{text} ASSISTANT:", "multi_modal_data": {"image": [picture(s) for s in seeds]}}


def hf_model(folder: Path) -> Any:
    """transformers' model of a checkpoint, float32. Any: its stubs refuse its own methods."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def hf_processor(folder: Path) -> Any:
    """transformers' processor of a checkpoint."""
    from transformers import LlavaProcessor

    from tests.factory import load_processor

    return load_processor(LlavaProcessor, folder)
