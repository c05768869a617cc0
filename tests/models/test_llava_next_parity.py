"""LLaVA-NeXT against transformers on tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from opsin.config import MediaConfig
from opsin.errors import UnsupportedModelError
from opsin.kernels import select
from opsin.layers import Placement
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models.hub import find_model
from opsin.models.llava_next.model import LlavaNextModel
from opsin.models.rule import PixelNorm
from opsin.models.weights import _slots
from opsin.types import MediaLayout
from tests.factories.llava_next import LlavaNextShape, hf_inputs, write_llava_next
from tests.factory import session_folder
from tests.models.driver import Driver, Oracle, Piece, Row

TOLERANCE = 1e-4
NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PROMPT = "USER: <image>\nWhat is in the picture, and <image> in this one? ASSISTANT:"
SIZES = [(90, 60), (40, 100)]  # width, height: two mosaics of four and three tiles, rows and columns of which are cut

SHAPES = {
    "mha": LlavaNextShape(),
    "mistral": LlavaNextShape(text="mistral", num_kv_heads=2, num_layers=3),
    "mistral-window": LlavaNextShape(text="mistral", num_kv_heads=2, window=12),
    "qwen2-tied": LlavaNextShape(text="qwen2", num_kv_heads=2, tied=True),
    "several-layers": LlavaNextShape(feature_layer=(-2, 0, 3)),
    "siglip": LlavaNextShape(tower="siglip", strategy="full", feature_layer=-1),
    "module-names": LlavaNextShape(module_names=True),
}


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def read(driver: Driver, images: Sequence[Image.Image]) -> tuple[list[list[torch.Tensor]], list[MediaLayout]]:
    """Tiles and layouts of pictures, as a media worker and the rule make them."""
    layouts = [driver.rule.layout("image", *image.size, 1, {}) for image in images]
    tiles: list[list[torch.Tensor]] = []
    for image, layout in zip(images, layouts, strict=True):
        out = np.empty(layout.plan.num_bytes, np.uint8)
        make_tiles(open_picture(image, MediaConfig()).decode(), layout.plan, out)
        height, width = layout.plan.tile_sizes[0]
        tiles.append(list(torch.from_numpy(out).view(-1, height, width, 3)))
    return tiles, layouts


@torch.inference_mode()
def prompt(driver: Driver, text: str, tiles: list[list[torch.Tensor]], layouts: Sequence[MediaLayout]) -> Row:
    """A row from a prompt whose marks are expanded by the rule."""
    waiting = iter(layouts)
    ids: list[int] = []
    for token in driver.tokenizer.encode(text):
        if token == driver.image_token_id:
            ids += [r.token_id for r in driver.rule.expand("image", 1, next(waiting)) for _ in range(r.count)]
        else:
            ids.append(token)
    return Row(ids, driver.model.encode(tiles, layouts) if tiles else None)


@torch.inference_mode()
def hf_logits(oracle: Oracle, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return oracle.model(**inputs).logits[0].float()


@pytest.fixture(scope="module")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LlavaNextShape], Path]:
    """Shape to checkpoint folder, each written once."""
    return session_folder(tmp_path_factory.mktemp("llava_next"), write_llava_next)


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> LlavaNextShape:
    return request.param


def test_llava_next_logits_and_greedy_ids_equal_transformers(next_checkpoint, shape):
    folder = next_checkpoint(shape)
    driver, oracle = Driver(folder), Oracle(folder)
    images = pictures(SIZES)
    inputs = hf_inputs(folder, PROMPT, images)
    row = prompt(driver, PROMPT, *read(driver, images))
    assert row.ids == inputs["input_ids"][0].tolist()
    expected = hf_logits(oracle, inputs)
    assert expected.std(-1).min() >= 0.5

    fresh = Row(row.ids[:], row.features)
    torch.testing.assert_close(driver.prefill(row), expected, atol=TOLERANCE, rtol=0)
    generated = oracle.model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert driver.generate(fresh, 16) == generated[0, len(row.ids) :].tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (32, 32), (500, 470)])
def test_llava_next_features_of_any_size_equal_transformers(next_checkpoint, size):
    folder = next_checkpoint(LlavaNextShape())
    driver, oracle = Driver(folder), Oracle(folder)
    (image,) = pictures([size])
    tiles, layouts = read(driver, [image])
    inputs = hf_inputs(folder, "<image>", [image])
    with torch.inference_mode():
        expected = oracle.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        found = driver.model.encode(tiles, layouts)
    torch.testing.assert_close(found, expected[0], atol=TOLERANCE, rtol=0)


def test_llava_next_text_only_prompt_equals_transformers(next_checkpoint):
    folder = next_checkpoint(LlavaNextShape())
    driver, oracle = Driver(folder), Oracle(folder)
    row = prompt(driver, "USER: How many cats are there? ASSISTANT:", [], [])
    torch.testing.assert_close(driver.prefill(row), oracle.logits(row.ids, None), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_llava_next_prefill_in_chunks_equals_whole(next_checkpoint, chunk):
    driver = Driver(next_checkpoint(SHAPES["mistral-window"]))
    made = read(driver, pictures(SIZES))
    whole, chunked = prompt(driver, PROMPT, *made), prompt(driver, PROMPT, *made)
    expected = driver.prefill(whole)
    parts = []
    while chunked.done < len(chunked.ids):
        parts.append(driver.run([Piece(chunked, min(chunk, len(chunked.ids) - chunked.done))]))
    torch.testing.assert_close(torch.cat(parts), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llava_next_half_precision_stays_near_transformers_float32(next_checkpoint, dtype):
    """Not further from the float32 truth than twice transformers' own error in this dtype."""
    folder = next_checkpoint(LlavaNextShape())
    driver = Driver(folder, dtype=dtype)
    images = pictures(SIZES)
    inputs = hf_inputs(folder, PROMPT, images)
    row = prompt(driver, PROMPT, *read(driver, images))
    truth = hf_logits(Oracle(folder), inputs)
    theirs = (
        hf_logits(Oracle(folder, dtype), inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}) - truth
    ).abs()
    ours = (driver.prefill(row) - truth).abs()
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


Made = tuple[list[list[torch.Tensor]], list[MediaLayout]]


def _swapped_pictures(driver: Driver, made: Made) -> Row:
    """The first picture's features where the second's belong; their numbers differ, so rows are only exchanged."""
    row = prompt(driver, PROMPT, *made)
    assert row.features is not None
    row.features = row.features.roll(made[1][0].num_features, dims=0)
    return row


def _swapped_tiles(driver: Driver, made: Made) -> Row:
    tiles, layouts = made
    first = [tiles[0][0], tiles[0][2], tiles[0][1], *tiles[0][3:]]
    return prompt(driver, PROMPT, [first, tiles[1]], layouts)


def _overview_last(driver: Driver, made: Made) -> Row:
    tiles, layouts = made
    return prompt(driver, PROMPT, [[*item[1:], item[0]] for item in tiles], layouts)


def _mosaic_first(driver: Driver, made: Made) -> Row:
    row = prompt(driver, PROMPT, *made)
    assert row.features is not None
    parts = row.features.split([layout.num_features for layout in made[1]])
    row.features = torch.cat([part.roll(-16, dims=0) for part in parts])
    return row


def _newline_before_each_row(driver: Driver, made: Made) -> Row:
    row = prompt(driver, PROMPT, *made)
    assert row.features is not None
    features = row.features.clone()
    start = 0
    for layout in made[1]:
        rows, cols, cut_rows, cut_cols = layout.numbers
        shape = (4 * rows - 2 * cut_rows, 4 * cols - 2 * cut_cols + 1)
        mosaic = features[start + 16 : start + layout.num_features].unflatten(0, shape)
        features[start + 16 : start + layout.num_features] = mosaic.roll(1, dims=1).flatten(0, 1)
        start += layout.num_features
    row.features = features
    return row


def _no_newline(driver: Driver, made: Made) -> Row:
    with torch.inference_mode():
        driver.model.image_newline.zero_()  # type: ignore[attr-defined]
    return prompt(driver, PROMPT, *made)


def _tile_after_tile(driver: Driver, made: Made) -> Row:
    """Rows of features that end with their tile, not with the mosaic: patches of tiles as they come."""
    row = prompt(driver, PROMPT, *made)
    assert row.features is not None
    rows, cols, cut_rows, _ = made[1][0].numbers
    shape = (4 * rows - 2 * cut_rows, 4 * cols + 1)
    end = 16 + shape[0] * shape[1]
    mosaic = row.features[16:end].unflatten(0, shape)
    tiles = torch.cat([mosaic[:, 4 * i : 4 * i + 4].flatten(0, 1) for i in range(cols)])
    row.features = torch.cat([row.features[:16], tiles, mosaic[:, -1], row.features[end:]])
    return row


def _other_cut(driver: Driver, made: Made) -> Row:
    """The first mosaic's rows cut at its end alone."""
    tiles, layouts = made
    row = prompt(driver, PROMPT, tiles, layouts)
    rows, cols, cut_rows, _ = layouts[0].numbers
    assert cut_rows
    whole = MediaLayout(layouts[0].plan, 16 + 4 * rows * (4 * cols + 1), 0, (rows, cols, 0, 0))
    with torch.inference_mode():
        uncut = driver.model.encode(tiles[:1], [whole])
    assert row.features is not None
    row.features = torch.cat([uncut[: layouts[0].num_features], row.features[layouts[0].num_features :]])
    return row


@pytest.mark.parametrize(
    "mistake",
    [
        _swapped_pictures,
        _swapped_tiles,
        _overview_last,
        _mosaic_first,
        _newline_before_each_row,
        _no_newline,
        _tile_after_tile,
        _other_cut,
    ],
)
def test_llava_next_mistakes_move_logits_by_1000_tolerances(next_checkpoint, mistake):
    """The comparison with transformers can fail."""
    driver = Driver(next_checkpoint(LlavaNextShape()))
    made = read(driver, pictures(SIZES))
    expected = driver.prefill(prompt(driver, PROMPT, *made))[-1]
    wrong = driver.prefill(mistake(driver, made))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE


def test_llava_next_without_newlines_is_refused(next_checkpoint):
    files = find_model(str(next_checkpoint(LlavaNextShape())))
    place = Placement(select(torch.device("cpu"), "reference"), torch.device("meta"), torch.float32)
    with pytest.raises(UnsupportedModelError, match="use_image_newline_parameter"):
        LlavaNextModel.from_hf({**files.config, "use_image_newline_parameter": False}, place=place, norm=NORM)


def test_llava_next_meta_model_encodes_without_reading_values(next_checkpoint: Any):
    """No value is read back from the device, and the parameters are the checkpoint's."""
    folder: Path = next_checkpoint(LlavaNextShape())
    driver = Driver(folder)
    place = Placement(select(torch.device("cpu"), "reference"), torch.device("meta"), torch.float32)
    model = LlavaNextModel.from_hf(find_model(str(folder)).config, place=place, norm=NORM)
    tiles, layouts = read(driver, pictures(SIZES))
    features = model.encode([[tile.to("meta") for tile in item] for item in tiles], layouts)
    assert features.shape == (sum(layout.num_features for layout in layouts), 64)
    # Of the tower's layers, those behind the last one that is wanted are not built.
    saved = [t.numel() for name, t in load_file(folder / "model.safetensors").items() if not _is_unused(model, name)]
    assert sum(p.numel() for p in model.parameters()) == sum(saved)


def _is_unused(model: LlavaNextModel, name: str) -> bool:
    table = model.weight_table()
    return table.is_unused(table.rename(name)) and table.rename(name) not in _slots(model)


# Their config.json on the hub, in the spelling of the transformers that wrote them.
_COMMON: dict[str, Any] = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "torch_dtype": "float16",
    "transformers_version": "4.39.0.dev0",
    "use_image_newline_parameter": True,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "v1.6-mistral-7b": _COMMON
    | {
        "pad_token_id": 32001,
        "text_config": {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
            "architectures": ["MistralForCausalLM"],
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
    },
    "v1.6-vicuna-7b": _COMMON
    | {
        "pad_token_id": 32001,
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
    },
}


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_llava_next_hub_config_gives_transformers_tensors(name):
    """Every tensor of the real size finds its place, with its shape; nothing is allocated."""
    config = HUB_CONFIGS[name]
    device = torch.device("meta")
    place = Placement(select(torch.device("cpu"), "reference"), device, torch.float16)
    model = LlavaNextModel.from_hf(config, place=place, norm=NORM)
    with device:
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    table = model.weight_table()
    ours = {key: slot.shape for key, slot in _slots(model).items()}
    tensors = {table.rename(key): tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    missing = {key for key in tensors if key not in ours}
    assert all(table.is_unused(key) for key in missing)
    assert {key: ours[key] for key in tensors if key in ours} == {k: s for k, s in tensors.items() if k in ours}
    assert "image_newline" in tensors
    unused = sum(int(np.prod(tensors[key])) for key in missing)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters()) - unused
