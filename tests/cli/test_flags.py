"""Flags and YAML files against the dataclasses they are generated from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from opsin.cli import flags, main
from opsin.config import EngineConfig
from opsin.errors import ConfigError, RequestError


def parser() -> flags.Parser:
    made = flags.Parser(prog="opsin try", allow_abbrev=False)
    flags.add_engine_flags(made)
    made.set_defaults(parser=made)
    return made


def settings(*arguments: str) -> dict[str, Any]:
    return flags.engine_settings(parser().parse_args(arguments))


def settings_from(tmp_path: Path, text: str, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    made = parser()
    given = flags.yaml_arguments(str(path), made)
    return flags.engine_settings(made.parse_args([*given, *arguments]))


def test_every_setting_has_a_flag_and_help() -> None:
    spelt = {option for action in flags.options(parser()) for option in action.option_strings}
    for group in flags.config_groups():
        for field in dataclasses.fields(group.cls):
            assert "--" + field.name.replace("_", "-") in spelt
    assert all(action.help for action in flags.options(parser()))


def test_no_flags_give_no_settings() -> None:
    assert settings() == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["--model", "a/b"], {"model": "a/b"}, id="str"),
        pytest.param(["-m", "a/b"], {"model": "a/b"}, id="alias"),
        pytest.param(["--max-model-len", "4096"], {"max_model_len": 4096}, id="optional-int"),
        pytest.param(["--max-model-len=8k"], {"max_model_len": 8000}, id="int-thousands"),
        pytest.param(["--max-media-bytes=1.5M"], {"max_media_bytes": 3 * 2**19}, id="int-mebi"),
        pytest.param(["--vision-cache-gb", "0.5"], {"vision_cache_gb": 0.5}, id="float"),
        pytest.param(["--dtype", "float16"], {"dtype": "float16"}, id="literal"),
        pytest.param(["--enforce-eager"], {"enforce_eager": True}, id="bool-on"),
        pytest.param(["--no-enable-prefix-caching"], {"enable_prefix_caching": False}, id="bool-off"),
        pytest.param(["--limit-mm-per-prompt", "image=2"], {"limit_mm_per_prompt": {"image": 2}}, id="pairs"),
        pytest.param(
            ["--limit-mm-per-prompt", "image=2,video=0"], {"limit_mm_per_prompt": {"image": 2, "video": 0}}, id="two"
        ),
        pytest.param(["--limit-mm-per-prompt", '{"image": 2}'], {"limit_mm_per_prompt": {"image": 2}}, id="json"),
        pytest.param(["--hf-overrides", '{"a": {"b": [1]}}'], {"hf_overrides": {"a": {"b": [1]}}}, id="json-nested"),
        pytest.param(
            ["--allowed-media-domains", "a.org, b.org"], {"allowed_media_domains": ("a.org", "b.org")}, id="tuple"
        ),
        pytest.param(["--task", "embedding"], {"runner": "pooling"}, id="old-task"),
    ],
)
def test_flag_value_of_each_type_is_converted(arguments: list[str], expected: dict[str, Any]) -> None:
    assert settings(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-model-len", "many"], "'many' is not a whole number"),
        (["--vision-cache-gb", "x"], "'x' is not a number"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--limit-mm-per-prompt", "image"], "neither a JSON object nor"),
        (["--hf-overrides", "{"], "is not JSON"),
        (["--task", "dance"], "'dance' is none of auto, generate"),
        (["--max-model", "3"], "unrecognized arguments: --max-model"),
    ],
)
def test_flag_with_wrong_value_exits_2_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        settings(*arguments)
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_flag_out_of_range_raises_config_error() -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization is 1\.5"):
        settings("--gpu-memory-utilization", "1.5")


def test_yaml_gives_the_same_settings_as_flags(tmp_path: Path) -> None:
    text = """
        model: a/b
        max-num-seqs: 4
        vision_cache_gb: 0.25
        enforce-eager: true
        enable_prefix_caching: false
        limit-mm-per-prompt: {image: 3}
        allowed-media-domains: [a.org, b.org]
        max_model_len:
    """
    assert settings_from(tmp_path, text) == {
        "model": "a/b",
        "max_num_seqs": 4,
        "vision_cache_gb": 0.25,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 3},
        "allowed_media_domains": ("a.org", "b.org"),
    }


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    given = settings_from(tmp_path, "model: a/b\nenforce-eager: true\n", "--model", "c/d", "--no-enforce-eager")
    assert given == {"model": "c/d", "enforce_eager": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-num-seq: 4", "unknown setting 'max-num-seq'. Did you mean 'max-num-seqs'?"),
        ("no-enforce-eager: true", "unknown setting 'no-enforce-eager'"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("enforce-eager: maybe", "enforce-eager is 'maybe'; it must be true or false"),
        ("- model", "holds a list"),
        ("model: [", "is not YAML"),
    ],
)
def test_yaml_that_is_wrong_raises_config_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from(tmp_path, text)
    assert message in str(caught.value)


def test_yaml_that_is_not_there_raises_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        flags.yaml_arguments(str(tmp_path / "none.yaml"), parser())


def test_empty_yaml_gives_no_settings(tmp_path: Path) -> None:
    assert settings_from(tmp_path, "# nothing\n") == {}


def test_groups_cover_engine_config() -> None:
    assert [group.name for group in flags.config_groups()] == [field.name for field in dataclasses.fields(EngineConfig)]


def test_flags_spelt_with_underscores_are_the_same() -> None:
    parser = main.build_parser()
    args = flags.parse(parser, ["serve", "a_b", "--max_model_len", "64", "--limit_mm_per_prompt=image=2", "--host=a_b"])
    assert (args.model, args.max_model_len, args.limit_mm_per_prompt, args.host) == ("a_b", 64, {"image": 2}, "a_b")


def test_limits_of_modalities_that_opsin_has_not_may_be_nought() -> None:
    limits = '{"image": 2, "audio": 0, "vision_chunk": 0}'
    assert settings("--limit-mm-per-prompt", limits) == {"limit_mm_per_prompt": {"image": 2}}
    with pytest.raises(ConfigError, match="audio"):
        settings("--limit-mm-per-prompt", "audio=1")


def test_settings_of_media_are_checked_before_anything_is_loaded() -> None:
    fine = '{"image": {"rgba_background_color": [0, 0, 0]}, "video": {"num_frames": 4}}'
    assert settings("--media-io-kwargs", fine)["media_io_kwargs"]["video"] == {"num_frames": 4}
    for wrong in ('{"image": {"image_mode": "L"}}', '{"video": {"frames": 4}}'):
        with pytest.raises(RequestError, match="media_io_kwargs"):
            settings("--media-io-kwargs", wrong)
