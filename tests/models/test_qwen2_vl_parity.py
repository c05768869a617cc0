"""Qwen2-VL and Qwen2.5-VL against transformers on tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from opsin.config import MediaConfig
from opsin.errors import UnsupportedModelError, WeightError
from opsin.kernels import select
from opsin.layers import Placement
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models.hub import find_model
from opsin.models.qwen2_vl.model import Qwen2VLModel
from opsin.models.rule import PixelNorm, Positions
from opsin.models.towers.qwen_vit import pack
from opsin.models.weights import _slots
from opsin.types import MediaItem
from tests.factories.qwen2_vl import IMAGE, Qwen2VLShape, hf_inputs
from tests.models.driver import Driver, Oracle, Piece, Row

TOLERANCE = 1e-4
NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PROMPT = f"USER: {IMAGE}\nWhat is in the picture, and {IMAGE} in this one? ASSISTANT:"
SIZES = [(90, 70), (200, 33)]  # width, height; the second is shrunk

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mrope_section": [2, 3, 3],
}
SHAPES = {
    "qwen2": Qwen2VLShape(),
    "qwen2-mha-3-layers": Qwen2VLShape(num_kv_heads=4, num_layers=3),
    "qwen2-mqa-tied": Qwen2VLShape(num_kv_heads=1, tied=True),
    "qwen2-flat": Qwen2VLShape(flat=True),
    "qwen2-flat-tied": Qwen2VLShape(flat=True, tied=True),
    "qwen2-yarn": Qwen2VLShape(text_extra=(("rope_parameters", YARN),)),
    "qwen2-window": Qwen2VLShape(
        text_extra=(("use_sliding_window", True), ("sliding_window", 12), ("max_window_layers", 1))
    ),
    "qwen2.5": Qwen2VLShape(version="2.5"),
    "qwen2.5-tied": Qwen2VLShape(version="2.5", tied=True),
}


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def media_items(driver: Driver, images: Sequence[Image.Image]) -> list[MediaItem]:
    return [MediaItem(b"", "image", driver.rule.layout("image", *image.size, 1, {})) for image in images]


def encode(driver: Driver, images: Sequence[Image.Image]) -> torch.Tensor:
    """Features of all pictures, packed."""
    layouts = [item.layout for item in media_items(driver, images)]
    tiles: list[list[torch.Tensor]] = []
    for image, layout in zip(images, layouts, strict=True):
        out = np.empty(layout.plan.num_bytes, np.uint8)
        make_tiles(open_picture(image, MediaConfig()).decode(), layout.plan, out)
        tiles.append([torch.from_numpy(out).view(*layout.plan.tile_sizes[0], 3)])
    with torch.inference_mode():
        return driver.model.encode(tiles, layouts)


def prompt(driver: Driver, text: str, images: Sequence[Image.Image] = ()) -> Row:
    """A row from a prompt whose pads are expanded by the rule."""
    items = media_items(driver, images)
    waiting = iter(items)
    ids: list[int] = []
    for token in driver.tokenizer.encode(text):
        if token == driver.image_token_id:
            ids += [r.token_id for r in driver.rule.expand("image", 1, next(waiting).layout) for _ in range(r.count)]
        else:
            ids.append(token)
    return Row(ids, encode(driver, images) if images else None, driver.rule.positions(ids, items))


@torch.inference_mode()
def hf_logits(oracle: Oracle, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return oracle.model(**inputs).logits[0].float()


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> Qwen2VLShape:
    return request.param


def test_qwen2_vl_logits_and_greedy_ids_equal_transformers(qwen_checkpoint, shape):
    folder = qwen_checkpoint(shape)
    driver, oracle = Driver(folder), Oracle(folder)
    images = pictures(SIZES)
    inputs = hf_inputs(folder, PROMPT, images)
    expected = hf_logits(oracle, inputs)
    assert expected.std(-1).min() >= 0.5

    row = prompt(driver, PROMPT, images)
    assert row.ids == inputs["input_ids"][0].tolist()
    torch.testing.assert_close(driver.prefill(row), expected, atol=TOLERANCE, rtol=0)
    with torch.inference_mode():
        generated = oracle.model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    fresh = prompt(driver, PROMPT, images)
    assert driver.generate(fresh, 16) == generated[0, len(row.ids) :].tolist()


@pytest.mark.parametrize("version", ["2", "2.5"])
@pytest.mark.parametrize("kernels", ["reference", "packed"])
def test_qwen2_vl_features_over_sizes_equal_transformers(qwen_checkpoint, version, kernels):
    """Many pictures of unlike sizes in one packed pass, windows of every shape among them."""
    folder = qwen_checkpoint(Qwen2VLShape(version=version))
    driver, oracle = Driver(folder, kernels=kernels), Oracle(folder)
    images = pictures([(16, 16), (300, 40), (48, 48), (48, 48), (96, 49), (40, 300), (1, 1), (640, 480), (7, 30)])
    inputs = hf_inputs(folder, IMAGE * len(images), images)
    with torch.inference_mode():
        expected = oracle.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    features = encode(driver, images)
    torch.testing.assert_close(features, torch.cat(list(expected)), atol=TOLERANCE, rtol=0)
    alone = torch.cat([encode(driver, [image]) for image in images])
    torch.testing.assert_close(features, alone, atol=TOLERANCE, rtol=0)


def test_qwen2_vl_text_only_prompt_equals_transformers(qwen_checkpoint):
    folder = qwen_checkpoint(Qwen2VLShape())
    driver, oracle = Driver(folder), Oracle(folder)
    row = prompt(driver, "USER: How many cats are there? ASSISTANT:")
    assert row.positions is None
    expected = hf_logits(oracle, {"input_ids": torch.tensor([row.ids])})
    torch.testing.assert_close(driver.prefill(row), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-window", "qwen2.5"])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_qwen2_vl_prefill_in_chunks_equals_whole(qwen_checkpoint, name, chunk):
    driver = Driver(qwen_checkpoint(SHAPES[name]))
    images = pictures(SIZES)
    whole, chunked = prompt(driver, PROMPT, images), prompt(driver, PROMPT, images)
    expected = driver.prefill(whole)
    parts = []
    while chunked.done < len(chunked.ids):
        parts.append(driver.run([Piece(chunked, min(chunk, len(chunked.ids) - chunked.done))]))
    torch.testing.assert_close(torch.cat(parts), expected, atol=TOLERANCE, rtol=0)


def test_qwen2_vl_rows_of_a_mixed_batch_equal_rows_alone(qwen_checkpoint):
    """One step with whole prompts, a middle chunk and decoding rows, each with positions of its own."""
    driver = Driver(qwen_checkpoint(Qwen2VLShape()))
    images = pictures([(90, 70), (33, 200), (64, 64)])
    prompts = [
        (f"{IMAGE} What? ", images[:1], 0),
        (PROMPT, images[1:], 5),
        ("Three? ASSISTANT:", [], None),
        (f"USER: {IMAGE} Which?", images[2:], None),
    ]

    def prepared() -> list[Piece]:
        pieces = []
        for text, own, done in prompts:
            row = prompt(driver, text, own)
            if done is None:
                driver.prefill(row)
                row.ids.append(77)
            elif done:
                driver.run([Piece(row, done)])
            pieces.append(Piece(row, 11 if done else len(row.ids) - row.done))
        return pieces

    together = driver.run(prepared())
    alone = torch.cat([driver.run([piece]) for piece in prepared()])
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("version", ["2", "2.5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_qwen2_vl_half_precision_stays_near_transformers_float32(qwen_checkpoint, dtype, version):
    """Not further from the float32 truth than twice transformers' own error in this dtype."""
    folder = qwen_checkpoint(Qwen2VLShape(version=version))
    driver = Driver(folder, dtype=dtype)
    images = pictures(SIZES)
    inputs = hf_inputs(folder, PROMPT, images)
    truth = hf_logits(Oracle(folder), inputs)
    theirs = (hf_logits(Oracle(folder, dtype), inputs) - truth).abs()
    ours = (driver.prefill(prompt(driver, PROMPT, images)) - truth).abs()
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


def test_qwen2_vl_weights_under_transformers_5_names_load(qwen_checkpoint, tmp_path):
    folder = qwen_checkpoint(Qwen2VLShape())
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert any(name.startswith("model.language_model.") for name in state)
    assert not any(name.startswith("model.language_model.") for name in load_file(folder / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    images = pictures(SIZES)
    first, second = Driver(folder), Driver(tmp_path)
    assert torch.equal(first.prefill(prompt(first, PROMPT, images)), second.prefill(prompt(second, PROMPT, images)))


def test_qwen2_vl_missing_tower_weight_is_named(qwen_checkpoint, tmp_path):
    folder = qwen_checkpoint(Qwen2VLShape())
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["visual.blocks.1.attn.qkv.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"tower\.blocks\.1\.attn\.q\.bias"):
        Driver(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "qwen3_vl"}, "qwen3_vl"),
        ({"deepstack": True}, "config.json.deepstack"),
        ({"text_config": {"qk_norm": True}}, "text_config.qk_norm"),
        ({"vision_config": {"use_head": True}}, "vision_config.use_head"),
        ({"vision_config": {"in_chans": 4}}, "in_chans"),
        ({"vision_config": {"hidden_size": 80}}, "80 values"),
        ({"vision_config": {"num_heads": 16}}, "multiples of 4"),
        ({"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}, "axial"),
        ({"text_config": {"rope_parameters": {"mrope_section": [4, 4, 4]}}}, "mrope_section"),
    ],
)
def test_qwen2_vl_config_that_is_not_implemented_is_refused(qwen_checkpoint, change, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        Driver(qwen_checkpoint(Qwen2VLShape()), overrides=change)


def test_qwen2_vl_config_with_text_keys_twice_is_taken_while_they_agree(qwen_checkpoint):
    """transformers 4.5x wrote the text config's keys at the top as well."""
    folder = qwen_checkpoint(Qwen2VLShape())
    text = find_model(str(folder)).config["text_config"]
    assert Driver(folder, overrides={"hidden_size": text["hidden_size"]}).model.spec.hidden_size == 64
    Driver(folder, overrides={"text_config": {"image_token_id": 5, "vision_end_token_id": 4}})
    with pytest.raises(UnsupportedModelError, match=r"config\.json\.hidden_size"):
        Driver(folder, overrides={"hidden_size": 32})


def test_pack_of_still_pictures_needs_no_order():
    packing = pack([(2, 4), (2, 2)], 2, None)
    assert packing.order_M is None
    assert (packing.full_lens, packing.window_lens) == ((8, 4), ())
    assert packing.positions_P2[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]


def test_pack_with_windows_keeps_pictures_apart():
    packing = pack([(2, 10), (4, 2)], 2, 2)
    assert packing.order_M is not None
    assert packing.order_M.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert packing.window_lens == (8, 8, 4, 8)
    assert sorted(pack([(12, 20)], 2, 4).order_M.tolist()) == list(range(60))  # type: ignore[union-attr]


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_qwen2_vl_encode_reads_nothing_back_from_the_device(qwen_checkpoint, version):
    """The meta device holds no values, so code that waits for one fails on it."""
    files = find_model(str(qwen_checkpoint(Qwen2VLShape(version=version))))
    device = torch.device("meta")
    place = Placement(select(torch.device("cpu"), "reference"), device, torch.float32)
    model = Qwen2VLModel.from_hf(files.config, place=place, norm=NORM)
    model.tower.patch_embed.pack()
    sizes = [(48, 96), (64, 32)]
    tiles = [[torch.empty(height, width, 3, dtype=torch.uint8, device=device)] for height, width in sizes]
    assert model.encode(tiles, []).shape == (18 + 8, 64)
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(1, device=device).item()


# ------------------------------------------------------------------------------------------- mistakes show


def _swapped(driver: Driver, images: list[Image.Image]) -> Row:
    row = prompt(driver, PROMPT, images)
    row.features = encode(driver, images[::-1])
    return row


def _axes_shifted(driver: Driver, images: list[Image.Image]) -> Row:
    row = prompt(driver, PROMPT, images)
    assert row.positions is not None
    time, height, width = row.positions.axes
    row.positions = Positions((width, time, height), row.positions.delta)
    return row


def _sequential(driver: Driver, images: list[Image.Image]) -> Row:
    row = prompt(driver, PROMPT, images)
    row.positions = None
    return row


def _raster_order(driver: Driver, images: list[Image.Image]) -> Row:
    """Features of the first picture column by column."""
    row = prompt(driver, PROMPT, images)
    _, rows, cols = (n // 2 for n in media_items(driver, images)[0].layout.numbers)
    assert row.features is not None
    first = row.features[: rows * cols].unflatten(0, (rows, cols)).transpose(0, 1).flatten(0, 1)
    row.features = torch.cat([first, row.features[rows * cols :]])
    return row


def _transposed_tower(driver: Driver, images: list[Image.Image]) -> Row:
    """Rows and columns exchanged in the tower's rotary positions alone."""
    tower: Any = driver.model.tower  # type: ignore[attr-defined]
    rotary = tower._rotary
    tower._rotary = lambda positions_P2: rotary(positions_P2.flip(-1))
    return prompt(driver, PROMPT, images)


def _flipped_channels(driver: Driver, images: list[Image.Image]) -> Row:
    return prompt(driver, PROMPT, [Image.fromarray(np.asarray(image)[..., ::-1].copy()) for image in images])


@pytest.mark.parametrize("version", ["2", "2.5"])
@pytest.mark.parametrize(
    "mistake", [_swapped, _axes_shifted, _sequential, _raster_order, _transposed_tower, _flipped_channels]
)
def test_qwen2_vl_mistakes_move_logits_by_1000_tolerances(qwen_checkpoint, version, mistake):
    """The comparison with transformers can fail."""
    driver = Driver(qwen_checkpoint(Qwen2VLShape(version=version)))
    images = pictures(SIZES)
    expected = driver.prefill(prompt(driver, PROMPT, images))[-1]
    wrong = driver.prefill(mistake(driver, images))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE


def test_qwen2_5_vl_windows_matter(qwen_checkpoint):
    folder = qwen_checkpoint(Qwen2VLShape(version="2.5"))
    windowed, blind = Driver(folder), Driver(folder, overrides={"vision_config": {"window_size": 10_000}})
    images = pictures(SIZES)
    assert (encode(windowed, images) - encode(blind, images)).abs().max() > 1000 * TOLERANCE


def test_qwen2_vl_dummy_and_meta_models_have_the_checkpoint_s_parameters(qwen_checkpoint: Any):
    """``opsin models show`` counts on the meta device."""
    folder: Path = qwen_checkpoint(Qwen2VLShape())
    files = find_model(str(folder))
    driver = Driver(folder)
    place = Placement(select(torch.device("cpu"), "reference"), torch.device("meta"), torch.float32)
    model = Qwen2VLModel.from_hf(files.config, place=place, norm=driver.rule.norm)
    saved = load_file(folder / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in saved.values())


# Their config.json on the hub, in the spelling of the transformers that wrote them.
_TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_token_id": 151654}
_TOKENS |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": {
        **_TEXT,
        **_TOKENS,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "sliding_window": 32768,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 1536,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    },
    "qwen2.5-vl-3b": {
        **_TEXT,
        **_TOKENS,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "sliding_window": 32768,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    },
}


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_qwen2_vl_hub_config_gives_transformers_tensors(name):
    """Every tensor of the real size finds its place, with its shape; nothing is allocated."""
    config = HUB_CONFIGS[name]
    device = torch.device("meta")
    place = Placement(select(torch.device("cpu"), "reference"), device, torch.bfloat16)
    model = Qwen2VLModel.from_hf(config, place=place, norm=NORM)
    with device:
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    table = model.weight_table()
    ours = {key: slot.shape for key, slot in _slots(model).items()}
    tensors = {table.rename(key): tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert {key: ours.get(key) for key in tensors if not table.is_unused(key)} == {
        key: shape for key, shape in tensors.items() if not table.is_unused(key)
    }
    assert model.spec.num_position_axes == 3
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
