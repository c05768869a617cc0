"""Rotary frequencies against transformers, and M-RoPE's axes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from opsin.errors import UnsupportedModelError
from opsin.layers.rope import Rope, RopeConfig, axis_of_frequency

HEAD_DIM, MAX_POSITION = 16, 256
CPU = torch.device("cpu")
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    },
}


def _ours(config: dict, context_len: int) -> Rope:
    return Rope(RopeConfig.from_hf(config, head_dim=HEAD_DIM, max_position=MAX_POSITION), context_len, CPU)


@pytest.mark.parametrize("length", [32, 200])
@pytest.mark.parametrize("name", KINDS)
def test_rope_equals_transformers(name, length):
    parameters = {**KINDS[name], "rope_theta": 5000.0}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=MAX_POSITION, rope_parameters=dict(parameters)
    )
    positions = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, length, 64), positions)
    rotary = _ours({"rope_parameters": parameters}, context_len=length)(positions)
    torch.testing.assert_close(rotary.cos_TR, cos[0, :, : HEAD_DIM // 2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotary.sin_TR, sin[0, :, : HEAD_DIM // 2], atol=1e-5, rtol=1e-5)


def test_longrope_says_when_it_takes_the_long_factors(caplog):
    """A user may want the short ones."""
    with caplog.at_level("INFO", logger="opsin.layers.rope"):
        _ours({"rope_parameters": KINDS["longrope"]}, context_len=64)
        assert not caplog.records
        _ours({"rope_parameters": KINDS["longrope"]}, context_len=65)
    assert "65 tokens; with max_model_len=64 it takes the short ones" in caplog.text


@pytest.mark.parametrize("name", KINDS)
def test_rope_transformers_4_spelling_reads_the_same(name):
    parameters = dict(KINDS[name])
    new = RopeConfig.from_hf(
        {"rope_parameters": {**parameters, "rope_theta": 5000.0}}, head_dim=HEAD_DIM, max_position=MAX_POSITION
    )
    parameters["type"] = parameters.pop("rope_type")
    old = RopeConfig.from_hf(
        {"rope_theta": 5000.0, "rope_scaling": parameters}, head_dim=HEAD_DIM, max_position=MAX_POSITION
    )
    assert old == new


def test_rope_partial_factor_rotates_part_of_the_head():
    rope = _ours({"rope_theta": 100.0, "partial_rotary_factor": 0.5}, 32)
    assert rope(torch.arange(3)[None]).cos_TR.shape == (3, HEAD_DIM // 4)


def test_rope_with_sections_takes_each_frequency_from_its_axis():
    config = {"rope_theta": 100.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    positions_AT = torch.tensor([[1, 2], [10, 20], [100, 200]])
    rotary = _ours(config, 32)(positions_AT)
    plain = [_ours({"rope_theta": 100.0}, 32)(positions_AT[a : a + 1]).cos_TR for a in range(3)]
    expected = torch.cat([plain[0][:, :2], plain[1][:, 2:5], plain[2][:, 5:]], dim=1)
    assert torch.equal(rotary.cos_TR, expected)
    assert all(table_TR.is_contiguous() for table_TR in rotary)  # else every layer copies it


def test_rope_sections_of_the_wrong_sum_are_refused():
    with pytest.raises(UnsupportedModelError, match="must sum to 8"):
        axis_of_frequency((2, 3), 8)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
        ({"rope_type": "linear"}, "lacks factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "lacks low_freq_factor, high_freq_factor"),
    ],
)
def test_rope_unknown_or_incomplete_kind_is_refused(parameters, message):
    with pytest.raises(UnsupportedModelError, match=message):
        RopeConfig.from_hf({"rope_parameters": parameters}, head_dim=HEAD_DIM, max_position=MAX_POSITION)
