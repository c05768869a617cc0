"""InternVL against transformers on tiny random checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from opsin.models.internvl import model as internvl
from opsin.models.internvl.model import InternVLModel
from opsin.models.rule import PixelNorm
from opsin.models.weights import _slots
from opsin.types import MediaLayout
from tests.factories.internvl import IMAGE, InternVLShape, hf_inputs, write_internvl
from tests.factory import session_folder
from tests.models.driver import Driver, Oracle, Piece, Row

TOLERANCE = 1e-4
NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PROMPT = f"USER: {IMAGE}\nWhat is in the picture, and {IMAGE} in this one? ASSISTANT:"
SIZES = [(90, 70), (200, 33)]  # width, height: several tiles each

SHAPES = {
    "qwen2": InternVLShape(),
    "qwen2-tied-mqa": InternVLShape(num_kv_heads=1, tied=True),
    "qwen2-window": InternVLShape(
        text_extra=(("use_sliding_window", True), ("sliding_window", 12), ("max_window_layers", 1))
    ),
    "llama": InternVLShape(text="llama", num_kv_heads=4, num_layers=3),
    "internvit-300m": InternVLShape(vision_extra=(("attention_bias", True),)),
    "internvit-6b": InternVLShape(vision_extra=(("norm_type", "rms_norm"), ("use_qk_norm", True))),
    "no-positions": InternVLShape(vision_extra=(("use_absolute_position_embeddings", False),)),
    "final-norm": InternVLShape(vision_extra=(("use_mean_pooling", False),)),
    "last-layer-by-number": InternVLShape(feature_layer=3, vision_extra=(("use_mean_pooling", False),)),
    "earlier-layer": InternVLShape(feature_layer=-2),
    "first-layer-mask-token": InternVLShape(feature_layer=1, vision_extra=(("use_mask_token", True),)),
    "ratio-1": InternVLShape(image_size=16, downsample_ratio=1.0),
    "ratio-quarter": InternVLShape(downsample_ratio=0.25),
    "large-tile": InternVLShape(image_size=64, max_patches=3),
    "dynamic-ntk": InternVLShape(
        text_extra=(("rope_parameters", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),)
    ),
}

Checkpoint = Callable[[InternVLShape], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Shape to checkpoint folder, each written once."""
    return session_folder(tmp_path_factory.mktemp("internvl"), write_internvl)


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def layouts_of(driver: Driver, images: Sequence[Image.Image]) -> list[MediaLayout]:
    return [driver.rule.layout("image", *image.size, 1, {}) for image in images]


def tiles_of(image: Image.Image, layout: MediaLayout) -> list[torch.Tensor]:
    out = np.empty(layout.plan.num_bytes, np.uint8)
    make_tiles(open_picture(image, MediaConfig()).decode(), layout.plan, out)
    return list(torch.from_numpy(out).view(-1, *layout.plan.tile_sizes[0], 3))


def encode(driver: Driver, images: Sequence[Image.Image]) -> torch.Tensor:
    """Features of all pictures, packed."""
    layouts = layouts_of(driver, images)
    tiles = [tiles_of(image, layout) for image, layout in zip(images, layouts, strict=True)]
    with torch.inference_mode():
        return driver.model.encode(tiles, layouts)


def prompt(driver: Driver, text: str, images: Sequence[Image.Image] = ()) -> Row:
    """A row from a prompt whose placeholders are expanded by the rule."""
    waiting = iter(layouts_of(driver, images))
    ids: list[int] = []
    for token in driver.tokenizer.encode(text):
        if token == driver.image_token_id:
            ids += [r.token_id for r in driver.rule.expand("image", 1, next(waiting)) for _ in range(r.count)]
        else:
            ids.append(token)
    return Row(ids, encode(driver, images) if images else None)


@torch.inference_mode()
def hf_logits(oracle: Oracle, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return oracle.model(**inputs).logits[0].float()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_internvl_logits_and_greedy_ids_equal_transformers(checkpoint: Checkpoint, shape: InternVLShape):
    folder = checkpoint(shape)
    driver, oracle = Driver(folder), Oracle(folder)
    images = pictures(SIZES)
    inputs = hf_inputs(folder, PROMPT, images)
    assert len(inputs["pixel_values"]) > len(images)
    expected = hf_logits(oracle, inputs)
    assert expected.std(-1).min() >= 0.5

    row = prompt(driver, PROMPT, images)
    assert row.ids == inputs["input_ids"][0].tolist()
    torch.testing.assert_close(driver.prefill(row), expected, atol=TOLERANCE, rtol=0)
    with torch.inference_mode():
        generated = oracle.model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    fresh = prompt(driver, PROMPT, images)
    assert driver.generate(fresh, 16) == generated[0, len(row.ids) :].tolist()


@pytest.mark.parametrize("kernels", ["reference", "packed"])
def test_internvl_features_over_sizes_equal_transformers(checkpoint: Checkpoint, kernels: str):
    """Many pictures of unlike tile counts in one pass."""
    folder = checkpoint(SHAPES["internvit-300m"])
    driver, oracle = Driver(folder, kernels=kernels), Oracle(folder)
    images = pictures([(16, 16), (300, 40), (48, 48), (96, 49), (40, 300), (1, 1), (640, 480), (7, 30)])
    inputs = hf_inputs(folder, IMAGE * len(images), images)
    with torch.inference_mode():
        expected = oracle.model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
    features = encode(driver, images)
    torch.testing.assert_close(features, expected, atol=TOLERANCE, rtol=0)
    alone = torch.cat([encode(driver, [image]) for image in images])
    torch.testing.assert_close(features, alone, atol=TOLERANCE, rtol=0)


def test_internvl_text_only_prompt_equals_transformers(checkpoint: Checkpoint):
    folder = checkpoint(InternVLShape())
    driver, oracle = Driver(folder), Oracle(folder)
    row = prompt(driver, "USER: How many cats are there? ASSISTANT:")
    expected = hf_logits(oracle, {"input_ids": torch.tensor([row.ids])})
    torch.testing.assert_close(driver.prefill(row), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-window"])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_internvl_prefill_in_chunks_equals_whole(checkpoint: Checkpoint, name: str, chunk: int):
    driver = Driver(checkpoint(SHAPES[name]))
    images = pictures(SIZES)
    whole, chunked = prompt(driver, PROMPT, images), prompt(driver, PROMPT, images)
    expected = driver.prefill(whole)
    parts = []
    while chunked.done < len(chunked.ids):
        parts.append(driver.run([Piece(chunked, min(chunk, len(chunked.ids) - chunked.done))]))
    torch.testing.assert_close(torch.cat(parts), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["internvit-300m", "internvit-6b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_internvl_half_precision_stays_near_transformers_float32(checkpoint: Checkpoint, name: str, dtype: torch.dtype):
    """Not further from the float32 truth than twice transformers' own error in this dtype."""
    folder = checkpoint(SHAPES[name])
    driver = Driver(folder, dtype=dtype)
    images = pictures(SIZES)
    inputs = hf_inputs(folder, PROMPT, images)
    truth = hf_logits(Oracle(folder), inputs)
    theirs = (hf_logits(Oracle(folder, dtype), inputs) - truth).abs()
    ours = (driver.prefill(prompt(driver, PROMPT, images)) - truth).abs()
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


def copy(folder: Path, to: Path) -> None:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())


def test_internvl_weights_under_transformers_5_names_load(checkpoint: Checkpoint, tmp_path: Path):
    folder = checkpoint(InternVLShape())
    copy(folder, tmp_path)
    state = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert any(name.startswith("model.language_model.") for name in state)
    assert not any(name.startswith("model.language_model.") for name in load_file(folder / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    images = pictures(SIZES)
    first, second = Driver(folder), Driver(tmp_path)
    assert torch.equal(first.prefill(prompt(first, PROMPT, images)), second.prefill(prompt(second, PROMPT, images)))


def test_internvl_missing_and_surplus_tower_weights_are_named(checkpoint: Checkpoint, tmp_path: Path):
    folder = checkpoint(InternVLShape())
    copy(folder, tmp_path)
    state = load_file(folder / "model.safetensors")
    state["vision_tower.encoder.layer.0.attention.q_norm.weight"] = state.pop("vision_tower.encoder.layer.1.lambda_2")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"tower\.encoder\.layers\.1\.lambda_2.*unused.*q_norm"):
        Driver(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"deepstack": True}, r"config\.json\.deepstack"),
        ({"text_config": {"qk_norm": True}}, r"text_config\.qk_norm"),
        ({"text_config": {"model_type": "qwen3"}}, "qwen3"),
        ({"vision_config": {"use_head": True}}, r"vision_config\.use_head"),
        ({"vision_config": {"norm_type": "batch_norm"}}, "norm_type"),
        ({"vision_config": {"num_channels": 4}}, "num_channels"),
        ({"vision_config": {"num_attention_heads": 5}}, "5 heads"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"vision_feature_layer": [-1, -2]}, "single layer"),
        ({"vision_feature_layer": -5}, "has 3 layers"),
        ({"projector_hidden_act": "tanhshrink"}, "projector_hidden_act"),
        ({"text_config": {"rope_parameters": {"rope_type": "dynamic", "alpha": 3.0}}}, "dynamic"),
    ],
)
def test_internvl_config_that_is_not_implemented_is_refused(
    checkpoint: Checkpoint, change: dict[str, Any], reason: str
):
    with pytest.raises(UnsupportedModelError, match=reason):
        Driver(checkpoint(InternVLShape()), overrides=change)


def test_internvl_dynamic_ntk_past_the_trained_length_is_refused(checkpoint: Checkpoint):
    """Up to it, the scaling changes nothing."""
    files = find_model(str(checkpoint(SHAPES["dynamic-ntk"])))
    place = Placement(select(torch.device("cpu"), "reference"), torch.device("meta"), torch.float32)
    assert InternVLModel.from_hf(files.config, place=place, norm=NORM, max_model_len=512).spec.max_position == 512
    with pytest.raises(UnsupportedModelError, match="max_model_len is 513"):
        InternVLModel.from_hf(files.config, place=place, norm=NORM, max_model_len=513)


def test_internvl_encode_reads_nothing_back_from_the_device(checkpoint: Checkpoint):
    """The meta device holds no values, so code that waits for one fails on it."""
    files = find_model(str(checkpoint(InternVLShape())))
    device = torch.device("meta")
    place = Placement(select(torch.device("cpu"), "reference"), device, torch.float32)
    model = InternVLModel.from_hf(files.config, place=place, norm=NORM)
    tiles = [[torch.empty(32, 32, 3, dtype=torch.uint8, device=device)] * count for count in (1, 5)]
    assert model.encode(tiles, []).shape == (6 * 4, 64)
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(1, device=device).item()


# ------------------------------------------------------------------------------------------- mistakes show


def _swapped(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    row = prompt(driver, PROMPT, images)
    parts = [encode(driver, [image]) for image in images[::-1]]
    row.features = torch.cat(parts)
    return row


def _thumbnail_first(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    row = prompt(driver, PROMPT, images)
    assert row.features is not None
    count = layouts_of(driver, images)[0].num_features
    first = row.features[:count].roll(driver.rule.tile.num_features, 0)
    row.features = torch.cat([first, row.features[count:]])
    return row


def _transposed_shuffle(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """The patches of a block column by column."""
    edge, merge = 2, 2

    def wrong(hidden_BPD: torch.Tensor, tile: Any) -> torch.Tensor:
        return hidden_BPD.unflatten(1, (edge, merge, edge, merge)).permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(0, 2)

    patch.setattr(internvl, "pixel_shuffle", wrong)
    return prompt(driver, PROMPT, images)


def _class_token_kept(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """The last row dropped, not the first."""
    tower: Any = driver.model.tower  # type: ignore[attr-defined]
    forward = tower.forward
    patch.setattr(tower, "forward", lambda patches: forward(patches).roll(1, 1))
    return prompt(driver, PROMPT, images)


def _no_layer_scale(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    for layer in driver.model.tower.encoder.layers:  # type: ignore[attr-defined]
        layer.lambda_2.data.fill_(1.0)
    return prompt(driver, PROMPT, images)


def _norms_per_head(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """Queries normalised head by head."""
    for layer in driver.model.tower.encoder.layers:  # type: ignore[attr-defined]
        norm = layer.attention.q_norm
        patch.setattr(
            norm,
            "forward",
            lambda x, norm=norm: (
                torch.nn.functional.rms_norm(x.unflatten(-1, (2, 16)), (16,), eps=norm.eps).flatten(-2) * norm.weight,
            ),
        )
    return prompt(driver, PROMPT, images)


def _no_tags(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """Text in place of the tags around the pictures."""
    row = prompt(driver, PROMPT, images)
    rule = driver.rule
    row.ids = [77 if token in (rule.start_token_id, rule.end_token_id) else token for token in row.ids]
    return row


def _flipped_channels(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    return prompt(driver, PROMPT, [Image.fromarray(np.asarray(image)[..., ::-1].copy()) for image in images])


@pytest.mark.parametrize(
    "mistake",
    [
        _swapped,
        _thumbnail_first,
        _transposed_shuffle,
        _class_token_kept,
        _no_layer_scale,
        _norms_per_head,
        _no_tags,
        _flipped_channels,
    ],
)
def test_internvl_mistakes_move_logits_by_1000_tolerances(
    checkpoint: Checkpoint, mistake: Any, monkeypatch: pytest.MonkeyPatch
):
    """The comparison with transformers can fail."""
    driver = Driver(checkpoint(SHAPES["internvit-6b"]))
    images = pictures([(90, 70), (70, 90)])
    right = driver.prefill(prompt(driver, PROMPT, images))
    wrong = driver.prefill(mistake(driver, images, monkeypatch))
    assert (right - wrong).abs().max() > 1000 * TOLERANCE


# The hub's config.json of InternVL3-1B, and one with the 6B tower of the largest.
_VISION_300M = {
    "architectures": ["InternVisionModel"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 1024,
    "image_size": [448, 448],
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-06,
    "layer_scale_init_value": 0.1,
    "model_type": "internvl_vision",
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": [14, 14],
    "projection_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": True,
    "use_qk_norm": False,
}
_HUB_CONFIG: dict[str, Any] = {
    "architectures": ["InternVLForConditionalGeneration"],
    "downsample_ratio": 0.5,
    "image_seq_length": 256,
    "image_token_id": 151667,
    "model_type": "internvl",
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 70,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0.dev0",
    "vision_config": _VISION_300M,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "internvl3-1b": _HUB_CONFIG,
    "internvit-6b": _HUB_CONFIG
    | {
        "vision_config": _VISION_300M
        | {
            "attention_bias": False,
            "hidden_size": 3200,
            "intermediate_size": 12800,
            "norm_type": "rms_norm",
            "num_attention_heads": 25,
            "num_hidden_layers": 45,
            "use_qk_norm": True,
        }
    },
}


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_internvl_hub_config_gives_transformers_tensors(name: str):
    """Every tensor of the real size finds its place, with its shape; nothing is allocated."""
    config = HUB_CONFIGS[name]
    device = torch.device("meta")
    place = Placement(select(torch.device("cpu"), "reference"), device, torch.bfloat16)
    model = InternVLModel.from_hf(config, place=place, norm=NORM)
    with device:
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    table = model.weight_table()
    ours = {key: slot.shape for key, slot in _slots(model).items()}
    tensors = {table.rename(key): tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert {key: ours.get(key) for key in tensors} == tensors
    # Both heads are there: the checkpoints of 2025 are not tied, and their config says so in neither place.
    assert not model.decoder.lm_head.is_tied
    assert sum(p.numel() for p in model.parameters()) == sum(math.prod(shape) for shape in tensors.values())
