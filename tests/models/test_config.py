"""Configs are read strictly: what opsin does not know, it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.errors import UnsupportedModelError
from opsin.kernels import reference
from opsin.layers import Placement
from opsin.models import MODELS, resolve
from opsin.models.decoder import DecoderConfig
from opsin.models.llava.model import LlavaModel
from opsin.models.rule import PixelNorm
from opsin.models.strict import StrictConfig
from opsin.models.towers.clip import ClipTower
from opsin.models.towers.siglip import SiglipTower

PLACE = Placement(reference.KERNELS, torch.device("meta"), torch.float32)
NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SMALL_TEXT = {"model_type": "llama", "num_hidden_layers": 1}


def windows(config: dict[str, Any]) -> list[int | None]:
    return [layer.window for layer in DecoderConfig.from_hf(config).layers]


def test_decoder_config_vicuna_of_llava_1_5_takes_llamas_defaults():
    """What the hub's llava-1.5-7b-hf has as its text_config, and no more."""
    config = DecoderConfig.from_hf(
        {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        }
    )
    assert (config.hidden_size, config.intermediate_size, config.num_heads) == (4096, 11008, 32)
    assert (len(config.layers), config.layers[0].num_kv_heads, config.layers[0].head_dim) == (32, 32, 128)
    assert (config.vocab_size, config.max_position, config.rope.theta) == (32064, 4096, 10000.0)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)],
    ids=["absent", "null", "given"],
)
def test_decoder_config_mistral_window(extra, expected):
    assert windows({"model_type": "mistral", "num_hidden_layers": 2, **extra}) == [expected] * 2


@pytest.mark.parametrize(
    ("extra", "expected"),
    [({}, None), ({"sliding_window": 4096}, None), ({"sliding_window": 7}, 7)],
    ids=["absent", "as-long-as-the-context", "given"],
)
def test_decoder_config_phi3_takes_its_own_defaults_and_window(extra, expected):
    config = DecoderConfig.from_hf({"model_type": "phi3", **extra})
    assert [layer.window for layer in config.layers] == [expected] * 32
    assert (config.hidden_size, config.intermediate_size, config.layers[0].num_kv_heads) == (3072, 8192, 32)
    assert (config.vocab_size, config.max_position, config.norm_eps, config.qkv_bias) == (32064, 4096, 1e-5, False)


def test_decoder_config_qwen2_window_only_where_switched_on():
    config = {"model_type": "qwen2", "num_hidden_layers": 3, "sliding_window": 7, "max_window_layers": 1}
    assert windows(config) == [None] * 3
    assert windows({**config, "use_sliding_window": True}) == [None, 7, 7]
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert windows({**config, "use_sliding_window": True, "layer_types": types}) == [7, None, None]
    assert DecoderConfig.from_hf(config).qkv_bias
    assert not DecoderConfig.from_hf(config).output_bias


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type is 'gpt2'; implemented are .*llama, mistral"),
        ({"model_type": "llama", "attn_logit_softcapping": 50.0}, r"text_config\.attn_logit_softcapping is 50\.0"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, r"text_config\.quantization_config"),
        ({"model_type": "llama", "is_encoder_decoder": True}, r"text_config\.is_encoder_decoder is True"),
        ({"model_type": "llama", "hidden_act": "mish"}, r"hidden_act is 'mish'; implemented are 'silu'"),
    ],
)
def test_decoder_config_unknown_is_refused_by_name(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        DecoderConfig.from_hf(config)


@pytest.mark.parametrize(
    ("tower", "config", "select", "message"),
    [
        (ClipTower, {"use_registers": 4}, -2, "use_registers is 4"),
        (ClipTower, {"num_channels": 1}, -2, "num_channels is 1"),
        (ClipTower, {"image_size": [336, 224]}, -2, "only squares"),
        (SiglipTower, {"num_hidden_layers": 2}, -4, "vision_feature_layer -4 does not exist"),
    ],
)
def test_tower_config_unknown_is_refused_by_name(tower, config, select, message):
    with pytest.raises(UnsupportedModelError, match=message):
        tower.read_config(config, select)


def test_tower_runs_no_layer_past_the_last_selected():
    config = ClipTower.read_config({"num_hidden_layers": 24}, -2)
    assert config.select == (23,)
    assert len(ClipTower(PLACE, config).encoder.layers) == 23


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type is 'pixtral'"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial'"),
        ({"projector_hidden_act": "mish"}, "projector_hidden_act is 'mish'"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_llava_unknown_setting_is_refused_by_name(extra, message):
    with pytest.raises(UnsupportedModelError, match=message):
        LlavaModel.from_hf({"text_config": SMALL_TEXT, **extra}, place=PLACE, norm=NORM)


def test_llava_defaults_are_those_of_its_config_class():
    model = LlavaModel.from_hf({"text_config": SMALL_TEXT}, place=PLACE, norm=NORM)
    assert model.tower.config.image_size == 336
    assert dict(model.named_parameters())["projector.linear_1.weight"].shape == (4096, 1024)


def test_strict_config_null_is_absent():
    config = StrictConfig({"a": None, "b": 2}, "test")
    assert config.take("a", 1) == 1
    assert config.require("b") == 2
    config.finish()
    with pytest.raises(UnsupportedModelError, match="test has no 'c'"):
        config.require("c")


def test_resolve_unknown_architecture_lists_the_supported_ones():
    with pytest.raises(UnsupportedModelError, match=r"names FooModel\. Supported .*: .*LlavaForConditionalGeneration"):
        resolve({"architectures": ["FooModel"]})
    with pytest.raises(UnsupportedModelError, match="names no architecture"):
        resolve({"architectures": None})


@pytest.mark.parametrize("family", MODELS, ids=lambda family: family.architecture)
def test_registry_paths_exist(family):
    assert isinstance(family.load_rule(), type)
    assert isinstance(family.load_model(), type)
