"""Where the parameters come from that requests leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opsin import LLM, ConfigError, SamplingParams


def defaults(folder: Path, **settings: Any) -> SamplingParams:
    with LLM(str(folder), **settings) as llm:
        return llm.get_default_sampling_params()


@pytest.fixture
def asking(folder: Path, tmp_path: Path) -> Path:
    """A model whose generation_config.json asks for a temperature and a length."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "generation_config.json").unlink()
    own = json.loads((folder / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(own | {"temperature": 0.5, "max_new_tokens": 40}))
    return copy


def test_defaults_are_the_models_or_none_or_a_folders(asking: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_k": 3, "eos_token_id": 9}')
    auto = defaults(asking)
    assert (auto.temperature, auto.max_tokens, auto.top_k) == (0.5, 40, 0)
    plain = defaults(asking, generation_config="vllm")
    assert (plain.temperature, plain.max_tokens) == (1.0, 16)
    foreign = defaults(asking, generation_config=str(tmp_path))
    assert (foreign.temperature, foreign.max_tokens, foreign.top_k) == (1.0, 16, 3)


def test_end_tokens_stay_the_models_unless_a_folder_has_others(asking: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    ends: list[frozenset[int]] = []
    for name in ("auto", "vllm", str(tmp_path)):
        with LLM(str(asking), generation_config=name) as llm:
            ends.append(llm._front.inputs.tokenizer.eos_token_ids)
    assert ends[0] == ends[1]
    assert {7, 9} <= ends[2]


def test_override_replaces_values_and_bounds_answers(asking: Path) -> None:
    over = {"temperature": 0.0, "max_new_tokens": 3}
    with LLM(str(asking), generation_config="vllm", override_generation_config=over) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.max_tokens) == (0.0, 3)
        (output,) = llm.generate("Say", SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_config": "/none"}, "/none has no generation_config.json"),
        ({"override_generation_config": {"do_sample": True}}, r"override_generation_config\['do_sample'\]"),
        ({"override_generation_config": {"temperature": "hot"}}, "it must be a number"),
        ({"override_generation_config": {"temperature": -1}}, "override_generation_config: temperature is -1"),
    ],
)
def test_generation_config_that_cannot_be_is_refused_at_start(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(folder), **settings)
