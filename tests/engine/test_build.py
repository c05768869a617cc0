"""Settings, and what starting an engine refuses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from opsin import LLM, ConfigError, ContextLengthError, RequestError, UnsupportedModelError
from opsin.config import EngineConfig, EngineSettings, SchedulerConfig
from opsin.engine.build import Budgets
from opsin.runner.memory import captured_share


def test_engine_settings_name_every_field_of_the_config():
    fields: dict[str, Any] = {}
    for group in dataclasses.fields(EngineConfig):
        owner = typing.get_type_hints(EngineConfig)[group.name]
        fields |= typing.get_type_hints(owner)
    del fields["model"]
    fields["task"] = typing.Literal["auto", "generate", "embed", "embedding"]  # vLLM's former name of ``runner``
    assert typing.get_type_hints(EngineSettings) == fields


def test_unknown_setting_is_refused_by_name(folder: Path):
    with pytest.raises(ConfigError, match="Unknown setting: gpu_memory"):
        LLM(str(folder), gpu_memory=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel_size": 2}, "only 1 is implemented"),
        ({"max_model_len": 10**6}, "positions end at 512"),
        ({"kv_cache_memory_bytes": 1000}, "Lower max_model_len"),
        ({"device": "gpu"}, "cannot be used here; write 'auto', 'cpu' or 'cuda'"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES=1"),
        ({"limit_mm_per_prompt": {"sound": 1}}, "keyed by 'image' or 'video'"),
        ({"block_size": 0}, "at least 1"),
        ({"mm_processor_kwargs": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_impossible_setting_says_what_to_do(folder: Path, settings: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        LLM(str(folder), **settings)


def test_model_that_does_not_exist_says_so():
    with pytest.raises(ConfigError, match="not a folder"):
        LLM("./no-such-model")


def test_model_folder_of_another_kind_lists_what_is_supported(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UnsupportedModelError, match=r"BertModel.*LlavaForConditionalGeneration"):
        LLM(str(tmp_path))


def test_memory_plan_accounts_for_weights_and_cache(make_llm: Callable[..., LLM], folder: Path):
    llm = make_llm()
    plan = llm.memory_plan
    saved = (folder / "model.safetensors").stat().st_size
    assert plan.weight_bytes == pytest.approx(saved, rel=0.2)
    block_bytes = llm.model_spec.kv_bytes_per_token(4) * plan.block_size
    assert plan.kv_bytes == plan.num_blocks * block_bytes
    assert plan.peak_step_bytes > 0
    # Room for every sequence at full length, and the scratch block.
    assert plan.num_blocks == 32 * 512 // 16 + 1


def test_dummy_weights_need_no_weight_file(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with LLM(str(tmp_path), load_format="dummy", media_workers=0) as llm:
        (output,) = llm.generate("Hello", use_tqdm=False)
    assert output.finished


def test_limit_mm_per_prompt_refuses_more(make_llm: Callable[..., LLM]):
    from tests.engine.conftest import asked

    llm = make_llm(limit_mm_per_prompt={"image": 1})
    with pytest.raises(ValueError, match=r"At most 1 image\(s\) may be provided in one prompt"):
        llm.generate(asked(1, 2), use_tqdm=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seqs": "4"}, "max_num_seqs is '4': expected `int | null`, got `str`."),
        ({"gpu_memory_utilization": "0.5"}, "gpu_memory_utilization is '0.5': expected `float`, got `str`."),
        ({"scheduling_policy": "lifo"}, "scheduling_policy is 'lifo'; it must be one of fcfs, priority."),
        ({"image_alpha": "black"}, "image_alpha is 'black'; it must be one of white, drop."),
        ({"load_format": "pt"}, "load_format is 'pt'; it must be one of auto, safetensors, dummy."),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, float32, bfloat16, float16, float, half."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_setting_of_another_type_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_flat(settings)
    assert str(caught.value) == message


def test_settings_take_paths_and_lists():
    config = EngineConfig.from_flat(
        {"model": Path("folder"), "allowed_media_domains": ["a.example"], "max_num_seqs": 4}
    )
    assert (config.model.model, config.media.allowed_media_domains) == ("folder", ("a.example",))


def test_former_and_newer_forms_of_vllm_settings_are_understood():
    config = EngineConfig.from_flat({"task": "embedding", "limit_mm_per_prompt": {"image": {"count": 2, "width": 512}}})
    assert config.model.runner == "pooling"
    assert config.media.limit_mm_per_prompt == {"image": 2}
    with pytest.raises(ConfigError, match="contradicts"):
        EngineConfig.from_flat({"task": "generate", "runner": "pooling"})


def test_settings_that_vllm_alone_has_are_refused_with_what_to_do_instead():
    for name, told in (("swap_space", "weights, keys and values stay"), ("max_lora_rank", "merge them into")):
        with pytest.raises(ConfigError, match=f"vLLM's {name} has no counterpart in opsin; leave it out: .*{told}"):
            EngineConfig.from_flat({name: 4})


def test_pooling_engine_makes_vectors_and_no_text(make_llm: Callable[..., LLM]):
    llm = make_llm(task="embed")
    assert len(llm.encode("Hello", use_tqdm=False)[0].outputs.embedding) == llm.model_spec.hidden_size
    with pytest.raises(RequestError, match="makes no text"):
        llm.generate("Hello", use_tqdm=False)


@pytest.mark.parametrize(("times", "words"), [(90_000, "characters besides white space"), (10**6, "are looked at")])
def test_prompt_far_beyond_the_context_is_refused_before_it_is_tokenised(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, times: int, words: str
):
    llm = make_llm()

    def unexpected(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tokenised all the same")

    monkeypatch.setattr("opsin.processing.expand.tokenize", unexpected)
    with pytest.raises(ContextLengthError, match=words):
        llm.generate("word " * times, use_tqdm=False)


def test_tokenizer_is_that_of_transformers(make_llm: Callable[..., LLM]):
    tokenizer = make_llm().get_tokenizer()
    assert tokenizer.decode(tokenizer("A red circle", add_special_tokens=False).input_ids) == "A red circle"


@pytest.mark.parametrize(
    ("on_gpu", "streams", "expected"), [(False, True, 16), (False, False, 2048), (True, True, 8192)]
)
def test_prompts_are_bounded_beside_answers_that_are_watched_on_a_cpu(on_gpu: bool, streams: bool, expected: int):
    budgets = Budgets.resolve(SchedulerConfig(), on_gpu, streams=streams)
    assert budgets.max_num_tokens_beside_decodes == expected
    asked = Budgets.resolve(SchedulerConfig(max_num_tokens_beside_decodes=5), on_gpu, streams=streams)
    assert asked.max_num_tokens_beside_decodes == 5


def test_graphs_are_given_the_share_of_a_step_that_is_captured():
    def pictures(count: int, num_patches: int) -> Any:
        return [SimpleNamespace(num_patches=num_patches)] * count

    assert captured_share(8192, []) == 0.5
    assert captured_share(2048, []) == 1
    assert captured_share(8192, pictures(8, 2048)) == 0.5
    assert captured_share(8192, pictures(4, 5000)) == 8192 / 15000  # three of them are a pass
    assert captured_share(8192, pictures(1, 20000)) == 0.5
    assert captured_share(32768, pictures(16, 4096)) == 0.5
    assert captured_share(8192, pictures(2, 1024)) == 1


@pytest.mark.skipif(not hasattr(TorchDispatchMode, "_should_skip_dynamo"), reason="this torch imports it all the same")
def test_start_on_a_cpu_imports_no_compiler():
    code = (
        "import sys; from opsin import LLM; llm = LLM('demo', device='cpu', kv_cache_memory_bytes=2**26);"
        "llm.generate('Hello', use_tqdm=False); print('torch._dynamo' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split()[-1] == "False"
