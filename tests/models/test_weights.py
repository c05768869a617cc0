"""Loading is strict: every tensor finds its place, every parameter is filled, and errors name names."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin.errors import WeightError
from opsin.kernels import reference
from opsin.kernels.quantized import FP8, INT8, quantize_weight
from opsin.layers import Placement
from opsin.layers.mlp import GatedMLP
from opsin.models.decoder import DecoderLayer
from opsin.models.hub import find_model
from opsin.models.llava.model import LlavaModel
from opsin.models.load import load_model
from opsin.models.quantization import allocate
from opsin.models.rule import PixelNorm
from opsin.models.weights import WeightTable, fill_randomly, load_weights, weight_files
from tests.factory import LlavaShape

NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(checkpoint, tmp_path: Path) -> Path:
    """A checkpoint of the test's own."""
    return Path(shutil.copytree(checkpoint(LlavaShape(num_kv_heads=2)), tmp_path / "model"))


def load(folder: Path, **settings: Any) -> LlavaModel:
    settings = {"dtype": torch.float32, "kernels": "reference", **settings}
    model = load_model(find_model(str(folder)), NORM, device=CPU, **settings)
    assert isinstance(model, LlavaModel)
    return model


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> list[str]:
    """Split the checkpoint in three files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-0000{i % 3 + 1}-of-00003.safetensors"
    for file in sorted(set(weight_map.values())):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sorted(set(weight_map.values()))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_load_fuses_projections_in_order(folder):
    tensors = load_file(folder / "model.safetensors")
    layer = load(folder).decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    prefix = "language_model.model.layers.0."
    expected = torch.cat([tensors[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(layer.self_attn.qkv_proj.weight, expected)
    expected = torch.cat([tensors[f"{prefix}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(layer.mlp.gate_up_proj.weight, expected)


def test_load_sharded_equals_single_file(folder, capsys):
    single = load(folder)
    shard(folder)
    assert same(load(folder), single)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n.replace("vision_tower.", "vision_tower.vision_model."),
        lambda n: (
            n.removeprefix("language_model.")
            if "lm_head" in n
            else "model." + n.replace("language_model.model.", "language_model.")
        ),
    ],
    ids=["hub-4.x", "module-names-5.x"],
)
def test_load_other_layouts_give_the_same_model(folder, rename):
    expected = load(folder)

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    edit(folder, change)
    assert same(load(folder), expected)


def test_load_ignores_what_is_declared_unused(folder):
    expected = load(folder)

    def change(tensors: Tensors) -> None:
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit(folder, change)
    assert same(load(folder), expected)


def test_load_tied_head_ignores_its_duplicate(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint(LlavaShape(tied=True)), tmp_path / "model"))
    expected = load(folder)
    edit(folder, lambda tensors: tensors.update({"language_model.lm_head.weight": torch.zeros(480, 64)}))
    assert same(load(folder), expected)


def test_load_missing_and_unused_weights_are_both_named(folder):
    def change(tensors: Tensors) -> None:
        tensors["language_model.model.layers.9.self_attn.q_proj.weight"] = torch.zeros(2, 2)
        del tensors["language_model.model.layers.1.self_attn.k_proj.weight"]

    edit(folder, change)
    with pytest.raises(WeightError) as error:
        load(folder)
    assert "1 missing: decoder.layers.1.self_attn.k_proj.weight." in str(error.value)
    assert "1 unused: language_model.model.layers.9.self_attn.q_proj.weight." in str(error.value)


def test_load_misshapen_weight_is_named_with_both_shapes(folder):
    name = "multi_modal_projector.linear_1.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(64, 31)}))
    with pytest.raises(WeightError, match=rf"{name}.* has shape \(64, 31\); the config asks for \(64, 32\)"):
        load(folder)


def test_load_repeated_weight_is_refused(folder):
    def change(tensors: Tensors) -> None:
        tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"].clone()

    edit(folder, change)
    with pytest.raises(WeightError, match="repeats"):
        load(folder)


def test_load_quantised_weight_is_refused(folder):
    name = "multi_modal_projector.linear_1.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(64, 32, dtype=torch.int8)}))
    with pytest.raises(WeightError, match="has dtype I8"):
        load(folder)


def test_load_missing_shard_is_named(folder):
    files = shard(folder)
    (folder / files[1]).unlink()
    with pytest.raises(WeightError, match=f"1 of them are not in .*: {files[1]}"):
        load(folder)


def test_load_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightError, match=r"model\.safetensors cannot be read as safetensors"):
        load(folder)


def test_load_pointer_of_git_lfs_says_what_to_do(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(WeightError, match="git lfs pull"):
        load(folder)


def test_load_broken_index_is_named(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightError, match="is not a weight index"):
        load(folder)


def test_weight_files_pickles_only_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightError, match=r"pickled weights only \(pytorch_model\.bin\).*Convert them"):
        weight_files(tmp_path)


def test_weight_files_none_are_refused(tmp_path):
    with pytest.raises(WeightError, match="holds no weights"):
        weight_files(tmp_path)


def test_load_dtype_is_cast(folder):
    assert {p.dtype for p in load(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_dummy_weights_need_no_file_and_follow_the_seed(folder):
    (folder / "model.safetensors").unlink()
    first, again, other = (load(folder, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    assert all(p.isfinite().all() for p in first.parameters())


def test_fill_randomly_fills_everything(folder):
    model = load(folder)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    fill_randomly(model, 0)
    assert all(p.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "stored"),
    [*itertools.product([None, FP8, INT8], ["apart", "merged"]), (FP8, "merged in 8 bits")],
    ids=str,
)
def test_widths_that_tensor_cores_do_not_take_are_filled_up_with_zeros(tmp_path, kind, stored):
    """Of 20 features, gated: what fills them up to 32 is found in no product."""
    is_stored_quantized = stored == "merged in 8 bits"
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"mlp.{name}.{part}": torch.randn(shape, generator=random)
        for name, width, size in (("gate_proj", 20, 48), ("up_proj", 20, 48), ("down_proj", 48, 20))
        for part, shape in (("weight", (width, size)), ("bias", (width,)))
    }
    apart = dict(tensors)
    if stored != "apart":
        for part in ("weight", "bias"):
            merged = [tensors.pop(f"mlp.{name}.{part}") for name in ("gate_proj", "up_proj")]
            tensors[f"mlp.gate_up_proj.{part}"] = torch.cat(merged)
    if is_stored_quantized:
        for name in ("gate_up_proj", "down_proj"):
            rows = quantize_weight(tensors[f"mlp.{name}.weight"], FP8)
            tensors[f"mlp.{name}.weight"], tensors[f"mlp.{name}.weight_scale"] = rows
    save_file(tensors, tmp_path / "model.safetensors")

    place = Placement(reference.KERNELS, CPU, torch.float32, defers_linears=kind is not None)
    model = torch.nn.ModuleDict({"mlp": GatedMLP(place, 48, 20, "silu", bias=True)})
    if kind is not None:
        dtypes = {name: "F8_E4M3" if tensor.dtype == FP8 else "F32" for name, tensor in tensors.items()}
        allocate(model, kind, dtypes if is_stored_quantized else None)
    for parameter in model.parameters():
        parameter.view(torch.uint8).fill_(0x7F)  # NaN, as memory that was not written may be
    load_weights(model, tmp_path, WeightTable((), ()))

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = apart[f"mlp.{name}.weight"]
        if kind is not None:
            rows = quantize_weight(weight, kind)
            weight = rows.values_TI.float() * rows.scale_T1
        if kind == FP8:
            inputs = quantize_weight(x, FP8)
            x = inputs.values_TI.float() * inputs.scale_T1
        return x @ weight.T + apart[f"mlp.{name}.bias"]

    mlp = model["mlp"]
    assert isinstance(mlp, GatedMLP)
    assert (mlp.down_proj.weight_scale is None) == (kind is None)
    x = torch.randn(3, 48, generator=random)
    gated = torch.nn.functional.silu(product(x, "gate_proj")) * product(x, "up_proj")
    torch.testing.assert_close(
        mlp.down_proj.gated(mlp.gate_up_proj(x), "silu"), product(gated, "down_proj"), rtol=1e-4, atol=1e-3
    )
