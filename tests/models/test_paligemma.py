"""PaliGemma's rule, and what only PaliGemma does, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsin.errors import RequestError, UnsupportedModelError
from opsin.kernels import select
from opsin.layers import Placement
from opsin.layers.embedding import TokenEmbedding
from opsin.models.paligemma.rule import PaliGemmaRule
from opsin.models.rule import PixelNorm
from tests.factories import hub_configs
from tests.factories.families import PALIGEMMA
from tests.factories.family import FEATURE_SIZES
from tests.factories.paligemma import hf_inputs
from tests.models.driver import TOLERANCE, Driver, Oracle, Row, meta_model, pictures

CONFIG = hub_configs.PALIGEMMA["paligemma-3b-pt-224"]
PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "image_seq_length": 256,
    "size": {"height": 224, "width": 224},
    "resample": 3,
}
Tiny = Callable[[Any, str], Path]


class Vocabulary:
    def __init__(self, **ids: int) -> None:
        self._ids = {f"<{name}>": number for name, number in ids.items()}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self._ids.get(token)


TOKENS = Vocabulary(bos=2, image=257152)


def make_rule(**processor: Any) -> PaliGemmaRule:
    return PaliGemmaRule.from_hf(CONFIG, PROCESSOR | processor, TOKENS)


def test_picture_of_the_hub_s_checkpoint_is_256_features_of_one_square():
    layout = make_rule().layout("image", 640, 480, 1, {})
    assert (layout.num_features, layout.num_patches) == (256, 256)
    assert layout.plan.tile_sizes == [(224, 224)]
    assert make_rule().norm == PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("options", [{}, {"resample": 0}, {"resample": 2}], ids=str)
def test_pixels_over_sizes_equal_transformers(tiny: Tiny, options: dict[str, Any]):
    folder = tiny(PALIGEMMA, "gemma")
    driver, images = Driver(folder), pictures(FEATURE_SIZES)
    expected = hf_inputs(folder, "<image>" * len(images), images, **options)["pixel_values"]
    tiles = [item[0].numpy() for item in driver.read(images, options).tiles]
    table = driver.rule.norm.table()
    made = np.stack([np.take_along_axis(table, tile.reshape(-1, 3), 0).reshape(tile.shape) for tile in tiles])
    assert np.array_equal(made.transpose(0, 3, 1, 2), expected.numpy())


@pytest.mark.parametrize(
    ("text", "num_items", "written"),
    [
        ("<image>caption en", 1, "<image><bos>caption en\n"),
        ("caption en", 1, "<image><bos>caption en\n"),
        ("caption en\n", 2, "<image><image><bos>caption en\n"),
        ("<image> or <image>?", 2, "<image> or <image><bos>?\n"),
        ("", 1, "<image><bos>\n"),
        ("Only text.", 0, "<bos>Only text.\n"),
    ],
)
def test_prompt_is_completed_with_marks_bos_and_newline(text: str, num_items: int, written: str):
    signs = [(i, i + 7) for i in range(len(text)) if text.startswith("<image>", i)]
    for offset, more in reversed(make_rule().complete(text, signs, num_items)):
        text = text[:offset] + more + text[offset:]
    assert text == written


def test_prompt_without_marks_has_the_processor_s_tokens(tiny: Tiny):
    folder = tiny(PALIGEMMA, "gemma")
    driver, images = Driver(folder), pictures([(40, 30)])
    for text in ("caption en", "<image>caption en"):
        assert (
            driver.prompt(text, images).ids == hf_inputs(folder, "<image>caption en", images)["input_ids"][0].tolist()
        )


def test_whole_prompt_sees_itself():
    assert make_rule().bidirectional([(0, 256)], 270) == [(0, 270)]


@pytest.mark.parametrize(
    ("config", "processor", "words"),
    [
        ({"vision_config": {"model_type": "vit"}}, {}, "vit"),
        ({}, {"do_pad": True}, "do_pad"),
        ({}, {"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor"),
        ({}, {"size": {"height": 448, "width": 448}}, "448"),
        ({}, {"resample": 9}, "resample"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(config: dict[str, Any], processor: dict[str, Any], words: str):
    with pytest.raises(UnsupportedModelError, match=words):
        PaliGemmaRule.from_hf(CONFIG | config, PROCESSOR | processor, TOKENS)


def test_tokenizer_without_bos_is_refused():
    with pytest.raises(UnsupportedModelError, match="<bos>"):
        PaliGemmaRule.from_hf(CONFIG, PROCESSOR, Vocabulary(image=257152))


def test_options_that_make_another_size_are_refused():
    with pytest.raises(RequestError, match="224 x 224"):
        make_rule().layout("image", 30, 30, 1, {"do_resize": False})
    assert make_rule().layout("image", 224, 224, 1, {"do_resize": False}).plan.views[0].ops == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projection_dim": 1024}, "projection_dim"),
        ({"text_config": CONFIG["text_config"] | {"model_type": "gemma4"}}, "gemma4"),
        ({"text_config": CONFIG["text_config"] | {"hidden_act": "silu"}}, "hidden_act"),
        ({"vision_config": None}, "vision_config"),
        ({"more": 1}, "more"),
    ],
)
def test_config_that_is_not_implemented_is_refused(change: dict[str, Any], words: str):
    with pytest.raises(UnsupportedModelError, match=words):
        meta_model(CONFIG | change)


def test_half_precision_scales_embeddings_as_transformers_rounds():
    kernels, meta = select(torch.device("cpu"), "reference"), torch.device("meta")
    scales = [
        TokenEmbedding(Placement(kernels, meta, dtype), 4, 3072, 3072**0.5).scale
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert scales == [torch.tensor(3072**0.5).item(), 55.5]


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_likely_mistakes_move_the_logits(tiny: Tiny, name: str):
    folder = tiny(PALIGEMMA, name)
    driver, images = Driver(folder), pictures(PALIGEMMA.sizes)
    expected = Oracle(PALIGEMMA.load(folder)).logits(hf_inputs(folder, PALIGEMMA.question, images))

    def moved(change: Callable[[Row], None]) -> float:
        row = driver.prompt(PALIGEMMA.question, images)
        change(row)
        return (driver.prefill(row)[-1] - expected[-1]).abs().max().item()

    def causal(row: Row) -> None:
        row.bidirectional = []

    def pictures_alone(row: Row) -> None:
        first = row.ids.index(driver.image_token_id)
        row.bidirectional = [(first, first + 16)]

    def swapped(row: Row) -> None:
        assert row.features is not None
        row.features = row.features.roll(16, 0)

    assert moved(lambda row: None) < TOLERANCE
    for mistake in (causal, pictures_alone, swapped):
        assert moved(mistake) > 1000 * TOLERANCE, mistake


def test_window_cuts_the_answer_s_view_and_not_the_prompt_s(tiny: Tiny):
    folder = tiny(PALIGEMMA, "gemma2-window")
    images = pictures(PALIGEMMA.sizes)
    narrow = Driver(folder)
    wide = Driver(folder, overrides={"text_config": {"sliding_window": 400}})
    rows = [driver.prompt(PALIGEMMA.question, images) for driver in (narrow, wide)]
    torch.testing.assert_close(narrow.prefill(rows[0]), wide.prefill(rows[1]), atol=TOLERANCE, rtol=0)
    for row in rows:
        row.ids.append(77)
    assert (narrow.prefill(rows[0]) - wide.prefill(rows[1])).abs().max() > 1000 * TOLERANCE
