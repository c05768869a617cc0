"""The examples that talk to a server, on a tiny checkpoint behind a real one."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opsin import AsyncLLM
from opsin.processing.jinja import read_template
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.examples.conftest import EXAMPLES, example
from tests.server.conftest import serving

CLIENT = "openai_chat_embedding_client_for_multimodal"
FAMILIES = {"vlm2vec": "phi3_v", "dse_qwen2_vl": "qwen2_vl"}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def served(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Iterator[tuple[str, str]]:
    """A form of messages, and the address of a server that wants it."""
    form = request.param
    template = read_template(str(EXAMPLES / f"template_{form}.jinja"))
    with (
        AsyncLLM(str(checkpoint(FAMILIES[form])), runner="pooling", chat_template=template, media_workers=1) as engine,
        serving(create_app(engine, ServerConfig(), model="tiny")) as address,
    ):
        yield form, f"{address}/v1"


def test_embedding_client_prints_vectors(
    served: tuple[str, str], pictures: list[str], capsys: pytest.CaptureFixture[str]
):
    form, address = served
    example(CLIENT)["main"]([form, "--image", pictures[0], "--base-url", address, "--dimensions", "8"])
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(printed) == (["Picture"] if form == "vlm2vec" else ["Picture", "Query", "Similarity"])
    vectors = [ast.literal_eval(text) for name, text in printed.items() if name != "Similarity"]
    for vector in vectors:
        assert len(vector) == 8
        assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)
    if form == "dse_qwen2_vl":
        assert float(printed["Similarity"]) == pytest.approx(
            sum(a * b for a, b in zip(*vectors, strict=True)), abs=1e-6
        )


def test_chat_client_asks_every_kind_of_question_of_a_served_model(
    checkpoint: Callable[[str], Path], pictures: list[str], capsys: pytest.CaptureFixture[str]
):
    with (
        AsyncLLM(str(checkpoint("phi3_v")), max_model_len=256, media_workers=1) as engine,
        serving(create_app(engine, ServerConfig(), model="tiny")) as address,
    ):
        images = [word for path in pictures for word in ("--image", path)]
        example("openai_chat_completion_client_for_multimodal")["main"]([*images, "--base-url", f"{address}/v1"])
    assert capsys.readouterr().out.count("? ") >= 4
