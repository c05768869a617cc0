"""``opsin models``: what is printed about a model agrees with the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from opsin.models import MODELS
from tests.factory import LlavaShape, build_llava, build_tokenizer

Command = Callable[..., tuple[int, str, str]]


def test_models_lists_every_architecture_with_a_summary(opsin_command: Command) -> None:
    code, out, _ = opsin_command("models")
    assert code == 0
    for family in MODELS:
        (line,) = [line for line in out.splitlines() if line.startswith(family.name + "  ")]
        assert len(line.split()) > 3
    assert json.loads(opsin_command("models", "--json")[1]) == list(
        dict.fromkeys(family.architecture for family in MODELS)
    )


def test_models_show_agrees_with_transformers(opsin_command: Command, tiny_llava: Callable[[LlavaShape], Path]) -> None:
    shape = LlavaShape(num_kv_heads=2, image_size=48)
    code, out, _ = opsin_command("models", "show", tiny_llava(shape), "--json", "--dtype", "bfloat16")
    facts = json.loads(out)
    hf = build_llava(shape, build_tokenizer())
    # opsin does not hold what it never runs: CLIP's last layer (the features are the last but one's) and last norm.
    unused = sum(
        parameter.numel()
        for name, parameter in hf.named_parameters()
        if "encoder.layers.2." in name or "post_layernorm" in name
    )
    assert code == 0
    assert facts["parameters"] == sum(parameter.numel() for parameter in hf.parameters()) - unused
    assert facts["kv_cache_kib_per_token"] == 2 * 2 * 2 * 16 * 2 / 1024  # layers, k and v, heads, head_dim, bytes
    assert set(facts["tokens_per_picture"].values()) == {shape.num_features}


def test_models_show_of_missing_folder_exits_2(opsin_command: Command, tmp_path: Path) -> None:
    code, _, err = opsin_command("models", "show", tmp_path / "none")
    assert code == 2
    assert "is not a folder" in err
