"""opsin, and the tests' own ``Phi3V``, against what the code published with the checkpoints answered.

``tests/models/recorded/phi3_v/README.md`` says how that was recorded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opsin import LLM, SamplingParams
from opsin.errors import MediaError
from opsin.media.ops import make_tiles
from opsin.models.phi3_v.rule import Phi3VRule
from opsin.models.weights import _slots
from tests.factories import hub_configs
from tests.factories.phi3_v import Phi3V, Phi3VShape, hf_inputs, write_phi3_v
from tests.models.driver import TOLERANCE, Driver, Row, meta_model

RECORDED = Path(__file__).parent / "recorded" / "phi3_v"
PICTURES: dict[str, Any] = json.loads((RECORDED / "pictures.json").read_text())
NETWORK: dict[str, Any] = json.loads((RECORDED / "network.json").read_text())
SHAPES = {"mha": Phi3VShape(), "gqa": Phi3VShape(num_kv_heads=2, num_layers=3, original=None, edge=48, num_crops=6)}
PROMPTS = [(shape, prompt) for shape in SHAPES for prompt in NETWORK[shape]["prompts"]]


class NoTokenizer:
    def convert_tokens_to_ids(self, token: str) -> int:
        return 32044


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.RandomState(100000 * width + height).randint(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


@cache
def arrays() -> dict[str, Any]:
    return dict(np.load(RECORDED / "network.npz"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_phi3_v(tmp_path_factory.mktemp(name), shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def rule() -> Phi3VRule:
    """That of the real checkpoints."""
    return Phi3VRule.from_hf(hub_configs.PHI3_V["phi-3-vision-128k"], {"num_crops": 16}, NoTokenizer())


@pytest.fixture(scope="module")
def large_tiles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small model with the true tiles."""
    return Driver(write_phi3_v(tmp_path_factory.mktemp("336"), Phi3VShape(edge=336))).model


# ---------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("num_crops", PICTURES["counts"])
def test_phi3_v_counts_over_sizes_equal_the_reference(rule: Phi3VRule, num_crops: str):
    edges, options = PICTURES["edges"], {"num_crops": int(num_crops)}
    for width, counts in zip(edges, PICTURES["counts"][num_crops], strict=True):
        for height, expected in zip(edges, counts, strict=True):
            if expected is None:
                with pytest.raises(MediaError, match="too narrow"):
                    rule.layout("image", width, height, 1, options)
            else:
                assert rule.layout("image", width, height, 1, options).num_features == expected, (width, height)


@pytest.mark.parametrize("case", PICTURES["pixels"], ids=lambda case: f"{case['width']}x{case['height']}")
def test_phi3_v_pixels_equal_the_reference(rule: Phi3VRule, large_tiles: Any, case: dict[str, Any]):
    """Tiles of 336 pixels bit for bit, and the overview made of them."""
    width, height = case["width"], case["height"]
    layout = rule.layout("image", width, height, 1, {"num_crops": case["num_crops"]})
    assert layout.num_features == case["num_img_tokens"]
    assert [336 * n for n in layout.numbers] == case["image_sizes"]
    pixels = np.empty(layout.plan.num_bytes, np.uint8)
    make_tiles(picture(width, height), layout.plan, pixels)
    tiles_BYX3 = pixels.reshape(-1, 336, 336, 3)
    normalised = np.stack([rule.norm.table()[:, c][tiles_BYX3[..., c]] for c in range(3)], axis=1)
    assert hashlib.sha256(np.ascontiguousarray(normalised).data).hexdigest() == case["tiles_sha256"]

    overview = large_tiles._overview([torch.from_numpy(tile) for tile in tiles_BYX3], layout)
    expected = torch.tensor(case["overview_every_7001th"])
    torch.testing.assert_close(overview.flatten()[::7001], expected, atol=2e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------- network


def test_phi3_v_weights_are_those_of_the_recording(folders: dict[str, Path]):
    for name, folder in folders.items():
        total = sum(float(tensor.double().abs().sum()) for tensor in load_file(folder / "model.safetensors").values())
        assert total == pytest.approx(NETWORK[name]["weights_sum"], rel=1e-9)


@pytest.fixture(scope="module")
def drivers(folders: dict[str, Path]) -> Callable[[str, str], Driver]:
    """By checkpoint and prompt: the engine's length decides between LongRoPE's factors."""

    @cache
    def make(name: str, max_model_len: int | None) -> Driver:
        return Driver(folders[name], max_model_len=max_model_len)

    return lambda name, prompt: make(name, None if prompt == "long" else 256)


@pytest.mark.parametrize(("name", "prompt"), PROMPTS)
def test_phi3_v_features_and_logits_equal_the_reference(drivers: Any, name: str, prompt: str):
    driver, told = drivers(name, prompt), NETWORK[name]["prompts"][prompt]
    images = [picture(*size) for size in told["sizes"]]
    features = driver.encode(images) if images else None
    if features is not None:
        expected = torch.from_numpy(arrays()[f"{name}.{prompt}.features"])
        torch.testing.assert_close(features[::5], expected, atol=TOLERANCE, rtol=0)
    ids = [token if token >= 0 else driver.image_token_id for token in told["input_ids"]]
    logits = driver.prefill(Row(ids, features))
    expected = torch.from_numpy(arrays()[f"{name}.{prompt}.logits"])
    assert expected.std(-1).min() >= 0.5
    torch.testing.assert_close(logits[told["at"]], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("long", [False, True], ids=["short-factors", "long-factors"])
def test_phi3_v_engine_answers_as_the_reference(folders: dict[str, Path], name: str, long: bool):
    """The whole road: token ids of the prompts, greedy tokens, and vectors."""
    prompts = {key: told for key, told in NETWORK[name]["prompts"].items() if (key == "long") == long}
    with LLM(str(folders[name]), max_model_len=None if long else 256, media_workers=0, trust_remote_code=True) as llm:
        asked: list[Any] = [
            {"prompt": told["text"], "multi_modal_data": {"image": [picture(*size) for size in told["sizes"]]}}
            for told in prompts.values()
        ]
        answers = llm.generate(asked, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        vectors: list[Any] = llm.embed(asked, use_tqdm=False)
        image = llm.get_tokenizer().convert_tokens_to_ids("<|image|>")
    for (key, told), answer, vector in zip(prompts.items(), answers, vectors, strict=True):
        assert answer.prompt_token_ids == [token if token >= 0 else image for token in told["input_ids"]]
        assert answer.outputs[0].token_ids == told["greedy"]
        expected = arrays()[f"{name}.{key}.vector"]
        np.testing.assert_allclose(vector.outputs.embedding, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "prompt"), PROMPTS)
def test_the_tests_own_phi3_v_equals_the_reference(folders: dict[str, Path], name: str, prompt: str):
    """So that what only it is asked, it answers as the reference would."""
    told = NETWORK[name]["prompts"][prompt]
    oracle = Phi3V.load(folders[name])
    inputs = hf_inputs(folders[name], told["text"], [picture(*size) for size in told["sizes"]])
    image = oracle.image_token_id
    assert inputs["input_ids"][0].tolist() == [token if token >= 0 else image for token in told["input_ids"]]
    logits = oracle(**inputs).logits[0, told["at"]]
    expected = torch.from_numpy(arrays()[f"{name}.{prompt}.logits"])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


# --------------------------------------------------------------------------------------------------- real size


@pytest.mark.parametrize(("num_crops", "expected"), [(4, 757), (16, 1921)])
def test_phi3_v_real_size_makes_the_features_it_promises(rule: Phi3VRule, num_crops: int, expected: int):
    """Of a photograph, on the meta device, beside one of another shape."""
    model = meta_model(hub_configs.PHI3_V["phi-3-vision-128k"])
    options = {"num_crops": num_crops}
    layouts = [rule.layout("image", *size, 1, options) for size in ((640, 480), (336, 1000))]
    tiles = [
        [torch.empty(336, 336, 3, dtype=torch.uint8, device="meta")] * (rows * cols)
        for rows, cols in (layout.numbers for layout in layouts)
    ]
    features = model.encode(tiles, layouts)
    assert layouts[0].num_features == expected
    assert features.shape == (sum(layout.num_features for layout in layouts), 3072)


# ------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("config", hub_configs.PHI3_V)
def test_phi3_v_tensors_of_the_real_checkpoint_find_their_places(config: str):
    """None is left on either side, but for the tower's last layer, its pooled output and a copy of the embeddings."""
    model = meta_model(hub_configs.PHI3_V[config])
    table = model.weight_table()
    theirs: dict[str, tuple[int, ...]] = {}
    for name, (num_layers, *size) in json.loads((RECORDED / "names.json").read_text()).items():
        theirs |= {name.replace("{}", str(i)): tuple(size) for i in range(max(num_layers, 1))}
    assert len(theirs) == 593
    slots = _slots(model)
    taken = {table.rename(name): size for name, size in theirs.items() if table.rename(name) in slots}
    assert taken == {name: slots[name].shape for name in taken}
    assert {part for name in taken for part in slots[name].parts} == {p for slot in slots.values() for p in slot.parts}
    left = {name for name in theirs if table.rename(name) not in taken}
    assert all(table.is_unused(table.rename(name)) for name in left)
    kinds = (r"\.encoder\.layers\.23\.", r"\.post_layernorm\.", r"\.wte\.weight$")
    assert all(any(re.search(kind, name) for kind in kinds) for name in left)
    assert len(left) == 16 + 2 + 1
