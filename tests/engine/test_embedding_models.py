"""Models that are run for their vectors: DSE-Qwen2's road from a message, Matryoshka lengths, scores, every token's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import LLM, MediaError, PoolingParams, RequestError
from opsin.inputs import MessageContent
from opsin.processing.pooling import VectorSizes
from tests.engine.conftest import assert_idle, engines_over, hf_model, picture
from tests.factories.qwen2_vl import IMAGE, Qwen2VLShape, hf_inputs, write_qwen2_vl

BLANK = Image.new("RGB", (56, 56))  # DSE's stand-in for the picture that a text query does not have


def dse_text(text: str) -> str:
    """What the model was trained on, written out."""
    return (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{IMAGE}{text}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )


def message(image: Any, text: str) -> MessageContent:
    return {"content": [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_vl(tmp_path_factory.mktemp("dse"), Qwen2VLShape(tied=True))


@pytest.fixture(scope="module")
def make_dse(qwen: Path) -> Iterator[Callable[..., LLM]]:
    with engines_over(qwen) as make:
        yield lambda **settings: make(runner="pooling", chat_template="dse_qwen2_vl", **settings)


@pytest.fixture(scope="module")
def states(qwen: Path) -> Callable[[str, Any], torch.Tensor]:
    """Final hidden states of transformers for a prompt with one picture."""
    model = hf_model(qwen)

    def run(text: str, image: Any) -> torch.Tensor:
        inputs = hf_inputs(qwen, text, [image])
        with torch.inference_mode():
            return model.model(**inputs).last_hidden_state[0].float()

    return run


@pytest.mark.parametrize("dimensions", [None, 64, 48, 16, 1])
def test_dse_vectors_of_pictures_and_queries_equal_transformers(
    make_dse: Callable[..., LLM], states: Callable[[str, Any], torch.Tensor], dimensions: int | None
):
    llm = make_dse()
    asked = [(picture(1, 90, 70), "What is shown in this image?"), (BLANK, "Query: What is the weather like today?")]
    outputs = llm.embed([message(*each) for each in asked], PoolingParams(dimensions=dimensions), use_tqdm=False)
    for output, (image, text) in zip(outputs, asked, strict=True):
        truth = states(dse_text(text), image)[-1, :dimensions]
        assert len(output.outputs.embedding) == (dimensions or 64)
        assert np.allclose(output.outputs.embedding, torch.nn.functional.normalize(truth, dim=-1), atol=2e-5)
        assert output.prompt_token_ids[-1] == llm.get_tokenizer().convert_tokens_to_ids("<|endoftext|>")
    assert_idle(llm)


def test_the_end_token_matters(make_dse: Callable[..., LLM], qwen: Path):
    with_end = make_dse().embed(message(BLANK, "Query: a"), use_tqdm=False)[0].outputs.embedding
    with LLM(str(qwen), runner="pooling", media_workers=0) as plain:
        without = plain.embed(message(BLANK, "Query: a"), use_tqdm=False)[0].outputs.embedding
    assert float(np.dot(with_end, without)) < 0.99


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7}, {"pipeline_depth": 2, "block_size": 4}])
def test_vectors_of_all_tokens_equal_transformers(
    make_dse: Callable[..., LLM], states: Callable[[str, Any], torch.Tensor], settings: dict[str, Any]
):
    llm = make_dse(**settings)
    prompt: Any = {"prompt": dse_text("Hello"), "multi_modal_data": {"image": picture(2, 40, 40)}}
    truth = torch.nn.functional.normalize(states(dse_text("Hello"), picture(2, 40, 40)), dim=-1).numpy()
    for _ in range(2):  # the second time all of it is cached, and must be computed all the same
        (output,) = llm.encode(prompt, pooling_task="token_embed", use_tqdm=False)
        assert output.outputs.data.shape == (len(output.prompt_token_ids), 64)
        assert np.allclose(output.outputs.data, truth, atol=2e-5)
    (pooled,) = llm.encode(prompt, use_tqdm=False)
    assert np.allclose(pooled.outputs.data, truth[-1], atol=2e-5)
    assert_idle(llm)


def test_score_is_the_cosine_of_vectors_in_every_pairing(make_dse: Callable[..., LLM]):
    llm = make_dse()
    documents: list[Any] = [message(picture(i), "What is shown in this image?") for i in range(3)]
    query = message(BLANK, "Query: noise")
    vectors = [np.array(output.outputs.embedding) for output in llm.embed([query, *documents], use_tqdm=False)]
    expected = [float(vectors[0] @ vector) for vector in vectors[1:]]
    outputs = llm.score(query, documents, use_tqdm=False)
    assert [output.outputs.score for output in outputs] == pytest.approx(expected, abs=1e-4)
    same = llm.score(documents, documents, use_tqdm=False)
    assert [output.outputs.score for output in same] == pytest.approx([1, 1, 1], abs=1e-4)
    (one,) = llm.score("some text", picture(1), use_tqdm=False)  # a picture alone is a message of its own
    assert -1 <= one.outputs.score < 0.999
    with pytest.raises(RequestError, match="Cannot compare 2 inputs with 3"):
        llm.score(documents[:2], documents, use_tqdm=False)
    with pytest.raises(RequestError, match="Cannot compare 1 inputs with 0"):
        llm.score(query, [], use_tqdm=False)
    with pytest.raises(RequestError, match="got NoneType"):
        llm.score(query, None, use_tqdm=False)
    with pytest.raises(MediaError):
        llm.score(query, 5, use_tqdm=False)
    with pytest.raises(RequestError, match="use encode"):
        llm.embed("Hello", PoolingParams(task="token_embed"), use_tqdm=False)
    assert_idle(llm)


def test_tasks_that_need_a_head_say_what_to_use(make_dse: Callable[..., LLM]):
    llm = make_dse()
    with pytest.raises(RequestError, match=r"classification head.*LLM\.pick"):
        llm.classify("Hello")
    with pytest.raises(RequestError, match="classification head"):
        llm.encode("Hello", pooling_task="token_classify", use_tqdm=False)


@pytest.mark.parametrize(
    ("config", "allowed", "refused", "words"),
    [
        ({}, (1, 63, 64), 65, "vectors have 64"),
        ({"is_matryoshka": True}, (1, 64), 65, "vectors have 64"),
        ({"is_matryoshka": False}, (64,), 32, "is_matryoshka is false"),
        ({"matryoshka_dimensions": [32, 16]}, (16, 32, 64), 48, "may be 16, 32 "),
        ({"is_matryoshka": False, "matryoshka_dimensions": [8]}, (8,), 16, "may be 8 "),
    ],
)
def test_lengths_of_vectors_are_checked_against_the_config(
    config: dict[str, Any], allowed: tuple[int, ...], refused: int, words: str
):
    sizes = VectorSizes.from_config(config, 64)
    for dimensions in allowed:
        sizes.check(dimensions)
    with pytest.raises(RequestError, match=words) as caught:
        sizes.check(refused)
    assert caught.value.param == "dimensions"


def test_matryoshka_keys_are_read_from_the_checkpoint_and_may_be_overridden(make_dse: Callable[..., LLM]):
    llm = make_dse(hf_overrides={"matryoshka_dimensions": [16, 32]})
    assert len(llm.embed("Hello", PoolingParams(dimensions=16), use_tqdm=False)[0].outputs.embedding) == 16
    with pytest.raises(RequestError, match="may be 16, 32"):
        llm.embed("Hello", PoolingParams(dimensions=8), use_tqdm=False)
