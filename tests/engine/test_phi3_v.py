"""Phi-3-vision through ``LLM``: what the tests that all families share do not ask."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin import LLM, RequestError, SamplingParams
from opsin.processing.jinja import ChatTemplate, read_template
from opsin.processing.tokenizer import Tokenizer
from tests.engine.conftest import assert_idle, engines_over, picture
from tests.factories.phi3_v import Phi3VShape, hf_inputs, write_phi3_v

RECORDED = Path(__file__).resolve().parents[1] / "models" / "recorded" / "phi3_v"
TEMPLATE = Path(__file__).resolve().parents[2] / "examples" / "template_vlm2vec.jinja"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recording's checkpoint, with code that nobody may run, as remote code is."""
    folder = write_phi3_v(tmp_path_factory.mktemp("phi3_v"), Phi3VShape())
    for name in ("configuration_phi3_v", "modeling_phi3_v", "processing_phi3_v"):
        (folder / f"{name}.py").write_text("raise RuntimeError('a checkpoint\\'s code was run')\n")
    return folder


@pytest.fixture(scope="module")
def make_llm(folder: Path) -> Iterator[Callable[..., LLM]]:
    with engines_over(folder) as make:
        yield make


def ids(llm: LLM, prompt: str, images: list[Image.Image], **options: Any) -> list[int]:
    asked: Any = {"prompt": prompt, "multi_modal_data": {"image": images}, "mm_processor_kwargs": options}
    return llm.generate(asked, GREEDY, use_tqdm=False)[0].prompt_token_ids


# ---------------------------------------------------------------------------------------------- settings and prompts


@pytest.mark.parametrize("trust", [True, False])
def test_remote_code_is_never_run_whether_trusted_or_not(make_llm: Callable[..., LLM], folder: Path, trust: bool):
    prompt, image = "<|user|>\n<|image_1|>\nWhat?<|end|>\n", picture(1, 90, 70)
    expected = hf_inputs(folder, prompt, [image])["input_ids"][0].tolist()
    assert ids(make_llm(trust_remote_code=trust), prompt, [image]) == expected


def test_tokenizer_opens_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture, capfd: Any):
    """transformers has no code for this model, and would say so three times."""
    Tokenizer.from_folder(folder)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_num_crops_of_a_request_goes_before_the_engine_s(make_llm: Callable[..., LLM], folder: Path):
    llm, prompt, image = make_llm(mm_processor_kwargs={"num_crops": 1}), "<|image_1|> What?", picture(1, 90, 70)
    for options, num_crops in (({}, 1), ({"num_crops": 6}, 6)):
        expected = hf_inputs(folder, prompt, [image], num_crops=num_crops)["input_ids"][0].tolist()
        assert ids(llm, prompt, [image], **options) == expected
    assert len(ids(make_llm(), prompt, [image])) > len(ids(llm, prompt, [image]))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<|image_2|> and <|image_1|>", "'<|image_2|>' where '<|image_1|>' was expected"),
        ("<|image_1|> and <|image_1|>", "'<|image_1|>' where '<|image_2|>' was expected"),
        ("<|image_0|> and <|image_1|>", "'<|image_0|>' where '<|image_1|>' was expected"),
        ("<|image_1|> and <|image_99999999999|>", "1 image placeholder"),
        ("<|image_1|>", "1 image placeholder"),
    ],
)
def test_placeholders_that_do_not_count_the_pictures_are_refused(llm: LLM, prompt: str, words: str):
    with pytest.raises(RequestError) as caught:
        ids(llm, prompt, [picture(1), picture(2)])
    assert words in str(caught.value)


def test_two_pictures_answer_by_their_order(llm: LLM):
    """The published code mixes them up where the sizes differ and the numbers are not in order; here they cannot be."""
    first, second = picture(1, 90, 70), picture(2, 90, 70)
    asked: list[Any] = [
        {"prompt": "<|image_1|><|image_2|> Which?", "multi_modal_data": {"image": images}}
        for images in ([first, second], [second, first])
    ]
    one, other = llm.embed(asked, use_tqdm=False)
    assert np.abs(np.subtract(one.outputs.embedding, other.outputs.embedding)).max() > 1e-2


def test_conversation_numbers_its_pictures_through_all_turns(make_llm: Callable[..., LLM], folder: Path):
    """Under a template that takes content as text, as the published one does."""
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"
    images = [picture(i, 60, 40 + i) for i in range(3)]
    parts: list[Any] = [{"type": "image_pil", "image_pil": image} for image in images]
    messages: Any = [
        {"role": "user", "content": [*parts[:2], {"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [parts[2], {"type": "text", "text": "And in this one?"}]},
    ]
    (output,) = make_llm().chat(messages, GREEDY, chat_template=template, use_tqdm=False)
    text = (
        "<|user|>\n<|image_1|>\n<|image_2|>\nHow many?<|end|>\n<|assistant|>\nTwo.<|end|>\n"
        "<|user|>\n<|image_3|>\nAnd in this one?<|end|>\n<|assistant|>\n"
    )
    assert output.prompt_token_ids == hf_inputs(folder, text, images)["input_ids"][0].tolist()


# ------------------------------------------------------------------------------------------------------------ VLM2Vec


def test_vlm2vec_template_joins_the_parts_of_one_message():
    template = ChatTemplate(read_template("vlm2vec"), {"bos_token": "<s>"})
    assert template.content_format == "openai"
    image, text = {"type": "image"}, {"type": "text", "text": "Represent the given image."}
    for content, expected in (
        ([image, text], "<s><|image_1|> Represent the given image."),
        ([text], "<s>Represent the given image."),
        ("Represent the given image.", "<s>Represent the given image."),
        ([text, image, image, text], "<s>{0} <|image_1|> <|image_2|> {0}".format("Represent the given image.")),
    ):
        for generation in (True, False):
            message = {"role": "user", "content": content}
            assert template.render([message], add_generation_prompt=generation) == expected
    with pytest.raises(RequestError, match="one message; this conversation has 2"):
        template.render([{"role": "user", "content": "a"}] * 2)


@pytest.mark.parametrize("given", ["vlm2vec", str(TEMPLATE)], ids=["by-name", "by-path"])
def test_vlm2vec_vectors_equal_the_reference(make_llm: Callable[..., LLM], given: str):
    """From messages to vectors, as its own code, with its own processor, makes them."""
    told = json.loads((RECORDED / "network.json").read_text())["mha"]["prompts"]
    vectors = np.load(RECORDED / "network.npz")
    llm = make_llm(task="embed", chat_template=given, max_model_len=256)
    image = llm.get_tokenizer().convert_tokens_to_ids("<|image|>")
    for key in ("vector", "query"):
        content: list[Any] = []
        for width, height in told[key]["sizes"]:
            noise = np.random.RandomState(100000 * width + height).randint(0, 256, (height, width, 3))
            content.append({"type": "image_pil", "image_pil": Image.fromarray(noise.astype(np.uint8))})
        content.append({"type": "text", "text": told[key]["text"].removeprefix("<|image_1|> ")})
        (output,) = llm.embed([{"content": content}], use_tqdm=False)
        expected_ids = [token if token >= 0 else image for token in told[key]["input_ids"]]
        assert output.prompt_token_ids == expected_ids
        np.testing.assert_allclose(output.outputs.embedding, vectors[f"mha.{key}.vector"], atol=1e-5)
    assert_idle(llm)
    with pytest.raises(RequestError, match="runner"):
        llm.generate("x", use_tqdm=False)
