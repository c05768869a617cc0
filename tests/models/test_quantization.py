"""Linear layers of 8 bits: quantised when loaded, or read from checkpoints that are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin.errors import ConfigError, UnsupportedModelError, WeightError
from opsin.kernels.quantized import FP8, quantize_rows, quantized_linear
from opsin.layers.linear import Linear, MergedLinear
from opsin.models.hub import find_model
from opsin.models.llava.model import LlavaModel
from opsin.models.load import load_model
from opsin.models.quantization import check_device, is_stored_quantized, quantized_linears
from opsin.models.rule import PixelNorm
from tests.factory import LlavaShape

NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FLOATS = {"num_bits": 8, "type": "float", "symmetric": True}
Tensors = dict[str, torch.Tensor]


def compressed(strategy: str = "channel", *, static: bool = False, **changes: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    rows = {**FLOATS, "strategy": "tensor" if static else "token", "dynamic": not static, "observer_kwargs": {}}
    group = {
        "targets": ["Linear"],
        "weights": {**FLOATS, "strategy": strategy, "dynamic": False, "observer": "minmax", "block_structure": None},
        "input_activations": rows,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": 1.2,
        "ignore": ["re:.*lm_head", "re:vision_tower.*", "re:multi_modal_projector.*"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        **changes,
    }


@pytest.fixture
def folder(checkpoint: Callable[[LlavaShape], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(LlavaShape(num_kv_heads=2)), tmp_path / "model"))


def load(folder: Path, **settings: Any) -> LlavaModel:
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), **settings}
    model = load_model(find_model(str(folder)), NORM, **settings)
    assert isinstance(model, LlavaModel)
    return model


def quantized(model: LlavaModel, path: str) -> Linear:
    return dict(quantized_linears(model))[path]


def quantize(
    folder: Path, config: dict[str, Any], scales: str, pattern: str = r"language_model\.model\..*_proj"
) -> None:
    """Turn a checkpoint's linear layers into e4m3 with scales for channels, tensors, or tensors as bare numbers."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if re.fullmatch(rf"{pattern}\.weight", name)]:
        weight = tensors[name]
        if scales == "channel":
            values, scale = quantize_rows(weight)
            tensors[f"{name}_scale"] = scale.bfloat16()
            tensors[name] = (weight / tensors[f"{name}_scale"].float()).clamp(-448, 448).to(FP8)
        else:
            values, scale = quantize_rows(weight.reshape(1, -1))
            tensors[f"{name}_scale"] = scale.reshape(() if scales == "number" else 1)
            tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.5)
            tensors[name] = values.view(weight.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def test_online_every_linear_layer_is_quantised_row_by_row(folder: Path):
    plain, ours = load(folder, kernels="reference"), load(folder, kernels="reference", quantization="fp8")
    names = dict(quantized_linears(ours))
    linears = {name for name, module in plain.named_modules() if isinstance(module, Linear)}
    assert linears - set(names) == {"decoder.lm_head", "tower.embeddings.patch_embedding"}
    for name, module in names.items():
        expected = quantize_rows(plain.get_parameter(f"{name}.weight"))
        assert torch.equal(module.weight.view(torch.uint8), expected.values_TI.view(torch.uint8))
        assert module.weight_scale is not None
        assert torch.equal(module.weight_scale, expected.scale_T1.squeeze(1))
    left = {name for name, _ in plain.named_parameters()} - {f"{name}.weight" for name in names}
    assert all(torch.equal(plain.get_parameter(name), ours.get_parameter(name)) for name in left)


def test_online_a_layer_computes_the_product_of_rounded_numbers(folder: Path):
    linear = quantized(load(folder, quantization="fp8"), "decoder.layers.0.mlp.gate_up_proj")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert linear.weight_scale is not None
    expected = quantized_linear(quantize_rows(x), linear.weight, linear.weight_scale, None, torch.float32)
    assert torch.equal(linear(x), expected)


def test_online_nothing_is_ever_held_in_half_precision_beside(folder: Path):
    """The weights of deferred layers have no memory until they are e4m3."""
    model = load(folder, quantization="fp8")
    for _, module in quantized_linears(model):
        assert module.weight.dtype == FP8
        assert module.weight.untyped_storage().nbytes() == module.weight.numel()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    plain = sum(p.numel() * p.element_size() for p in load(folder).parameters())
    saved = sum(3 * m.weight.numel() - 4 * m.weight.shape[0] for _, m in quantized_linears(model))
    assert plain - size == saved


def test_dummy_weights_are_those_of_the_plain_model_quantised(folder: Path):
    plain, ours = (
        load(folder, load_format="dummy", dtype=torch.bfloat16, kernels="reference", quantization=quantization)
        for quantization in (None, "fp8")
    )
    assert dict(quantized_linears(ours))
    for name, module in quantized_linears(ours):
        expected = quantize_rows(plain.get_parameter(f"{name}.weight"))
        assert torch.equal(module.weight.view(torch.uint8), expected.values_TI.view(torch.uint8))


def test_int8_model_is_the_one_with_its_rounded_weights(folder: Path):
    rounded, ours = load(folder, kernels="reference"), load(folder, quantization="int8")
    names = dict(quantized_linears(ours))
    assert names.keys() == dict(quantized_linears(load(folder, quantization="fp8"))).keys()
    for name, module in names.items():
        assert module.weight.dtype == torch.int8
        assert module.weight_scale is not None
        weight = rounded.get_parameter(f"{name}.weight")
        exact = module.weight * module.weight_scale.unsqueeze(1)
        assert 0 < (exact - weight).abs().max() < 0.01 * weight.abs().max()
        weight.data.copy_(exact)
    generator = torch.Generator().manual_seed(0)
    tiles = [torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)]
    layouts: Any = [None]
    expected, got = (model.encode([tiles], layouts) for model in (rounded, ours))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_int8_of_a_checkpoint_that_is_fp8_is_refused(folder: Path):
    quantize(folder, compressed(), "channel")
    with pytest.raises(ConfigError, match=r"is 'int8'; the checkpoint is FP8 already"):
        load(folder, quantization="int8")


def test_int8_on_a_gpu_is_refused_with_what_to_use():
    with pytest.raises(ConfigError, match=r"kernels are a CPU's.*Use 'fp8'"):
        check_device(torch.device("cuda"), torch.int8)


@pytest.mark.parametrize("scales", ["channel", "tensor", "number"])
def test_stored_weights_and_scales_are_taken_as_they_are(folder: Path, scales: str):
    plain = load(folder, kernels="reference")
    config = compressed("channel") if scales == "channel" else compressed("tensor", static=True)
    quantize(folder, config, scales)
    stored = load_file(folder / "model.safetensors")
    ours = load(folder)
    assert all(name.startswith("decoder.layers") for name, _ in quantized_linears(ours))
    assert len(list(quantized_linears(ours))) == 4 * len(ours.decoder.layers)
    prefix = "language_model.model.layers.1.self_attn."
    qkv = quantized(ours, "decoder.layers.1.self_attn.qkv_proj")
    assert isinstance(qkv, MergedLinear)
    assert qkv.weight_scale is not None
    values = torch.cat([stored[f"{prefix}{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(qkv.weight.view(torch.uint8), values.view(torch.uint8))
    sizes = tuple(qkv.pieces.values())
    scale = torch.cat(
        [
            stored[f"{prefix}{x}_proj.weight_scale"].float().flatten().expand(n)
            for x, n in zip("qkv", sizes, strict=True)
        ]
    )
    assert torch.equal(qkv.weight_scale, scale)
    was = plain.get_parameter("decoder.layers.1.self_attn.qkv_proj.weight")
    assert ((qkv.weight.float() * scale[:, None]) - was).norm() / was.norm() < 0.05


def test_stored_fp8_method_is_taken_as_well(folder: Path):
    quantize(folder, {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, "tensor")
    assert dict(quantized_linears(load(folder)))


def test_stored_asked_for_again_changes_nothing(folder: Path):
    quantize(folder, compressed(), "channel")
    ours, again = load(folder), load(folder, quantization="fp8")
    assert [n for n, _ in quantized_linears(ours)] == [n for n, _ in quantized_linears(again)]


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_stored_without_a_scale_names_it(folder: Path):
    quantize(folder, compressed(), "channel")
    edit(folder, lambda tensors: tensors.pop("language_model.model.layers.0.self_attn.q_proj.weight_scale"))
    with pytest.raises(WeightError, match=r"1 missing: decoder\.layers\.0\.self_attn\.q_proj\.weight_scale\."):
        load(folder)


def test_stored_pieces_of_one_product_must_be_alike(folder: Path):
    quantize(folder, compressed(), "channel", pattern=r"language_model\..*\.q_proj")
    with pytest.raises(WeightError, match=r"q_proj\.weight, .*some are FP8 and others are not"):
        load(folder)


def test_stored_layers_that_stay_in_half_precision_are_refused_by_name(folder: Path):
    quantize(folder, compressed(), "channel", pattern=r"language_model\.lm_head")
    with pytest.raises(WeightError, match=r"lm_head\.weight.* has dtype F8_E4M3"):
        load(folder)


def test_fp8_tensors_without_a_config_that_says_so_are_refused(folder: Path):
    quantize(folder, compressed(), "channel")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(WeightError, match=r"has dtype F8_E4M3.*if config\.json says how they were made"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "awq", "bits": 4},
            r"quant_method is 'awq'; implemented are 'compressed-tensors'.*Use the half",
        ),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
        ({"bits": 4}, "quant_method is None"),
        ("fp8", "is a str; expected an object"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"weight_block_size is \[128, 128\]"),
        ({"quant_method": "fp8", "activation_scheme": "other"}, "activation_scheme is 'other'"),
        ({"quant_method": "fp8", "new_key": 1}, r"quantization_config\.new_key is 1"),
        (compressed(format="pack-quantized"), "format is 'pack-quantized'"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (compressed("group"), r"weights is static by group; implemented is static by channel or static by tensor"),
        (compressed(config_groups={"g": {"weights": FLOATS, "input_activations": None}}), "static by None"),
    ],
)
def test_other_ways_are_refused_with_what_to_do(config: Any, message: str):
    with pytest.raises(UnsupportedModelError, match=message):
        is_stored_quantized({"quantization_config": config})


@pytest.mark.parametrize("config", [None, compressed(), compressed("tensor", static=True)])
def test_known_ways_are_told_from_none(config: Any):
    assert is_stored_quantized({"quantization_config": config}) is (config is not None)
