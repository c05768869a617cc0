"""How ``LLM`` is called: parameters of the wrong kind, the end of the context, Ctrl-C while prompts are read."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opsin import LLM, BeamSearchParams, ConfigError, EngineArgs, PoolingParams, RequestError, SamplingParams
from opsin.engine.feeder import MediaFeeder
from opsin.types import MediaNeed
from tests.engine.conftest import asked, assert_idle

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
FOREIGN: dict[str, Any] = {  # as vLLM's vision examples and the users' own scripts give them
    "enable_mm_embeds": True,
    "mm_processor_cache_gb": 4,
    "compilation_config": {"level": 3},
    "disable_log_stats": True,
}


@pytest.mark.parametrize(
    "params", [PoolingParams(), {"temperature": 0}, [5], 7], ids=["pooling", "dict", "number-in-list", "number"]
)
def test_generate_params_of_another_kind_are_refused(llm: LLM, params: Any):
    with pytest.raises(RequestError, match="must be SamplingParams"):
        llm.generate("Hello", params, use_tqdm=False)


def test_embed_sampling_params_are_refused(llm: LLM):
    with pytest.raises(RequestError, match="must be PoolingParams"):
        llm.embed("Hello", SamplingParams(), use_tqdm=False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("prompts", [b"Hello", 3.5], ids=["bytes", "number"])
def test_generate_prompts_that_are_no_list_are_refused(llm: LLM, prompts: Any):
    with pytest.raises(RequestError, match="prompts must be a prompt or a list of prompts"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("messages", [5, "Hello", None], ids=["number", "text", "none"])
def test_chat_messages_that_are_no_list_are_refused(llm: LLM, messages: Any):
    with pytest.raises(RequestError, match="messages must be a list"):
        llm.chat(messages, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("options", [5, {1: 2}], ids=["number", "number-as-key"])
def test_generate_processor_options_of_another_kind_are_refused(llm: LLM, options: Any):
    with pytest.raises(RequestError, match="mm_processor_kwargs must be"):
        llm.generate(asked(1), GREEDY, use_tqdm=False, mm_processor_kwargs=options)


def test_settings_that_vllm_alone_has_and_that_change_no_answer_are_told_of(
    make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
):
    off: dict[str, Any] = {"enable_lora": False, "enable_chunked_prefill": False, "tokenizer_mode": "auto"}
    with caplog.at_level(logging.WARNING, "opsin"):
        llm = make_llm(**FOREIGN, **off)
    told = [record.getMessage().partition(" ")[0] for record in caplog.records]
    assert told == list(FOREIGN)
    assert len(llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize(
    "setting", [{"enable_lora": True}, {"convert": "classify"}, {"data_parallel_size": 2}, {"reasoning_parser": "x"}]
)
def test_settings_that_vllm_alone_has_and_that_matter_are_refused(
    make_llm: Callable[..., LLM], setting: dict[str, Any]
):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        make_llm(**setting)


def test_settings_that_are_none_are_left_at_their_defaults(make_llm: Callable[..., LLM]):
    given = make_llm(seed=None, mm_processor_kwargs=None, limit_mm_per_prompt=None, hf_overrides=None, dtype=None)
    assert given.config == make_llm().config


def test_modalities_that_opsin_has_not_may_be_limited_to_none(make_llm: Callable[..., LLM]):
    limits = {"image": 1, "video": 0, "audio": 0, "vision_chunk": 0}
    assert make_llm(limit_mm_per_prompt=limits).config.media.limit_mm_per_prompt == {"image": 1, "video": 0}
    with pytest.raises(ConfigError, match="audio"):
        make_llm(limit_mm_per_prompt={"audio": 1})


def test_engine_args_are_gathered_changed_and_made_an_engine_of(make_llm: Callable[..., LLM]):
    reference = make_llm()
    args = EngineArgs(model=reference.config.model.model, device="cpu")
    args.limit_mm_per_prompt = {"image": 0, "audio": 0} | dict(args.limit_mm_per_prompt or {"image": 2})
    args.mm_processor_cache_gb = 0
    args.seed = 7
    with LLM.from_engine_args(args) as llm:
        assert (llm.config.model.seed, llm.config.media.limit_mm_per_prompt) == (7, {"image": 2})
        assert llm.config.cache == reference.config.cache


@pytest.mark.parametrize("workers", [0, 1])
def test_engine_that_nobody_holds_leaves_no_thread_and_no_process(folder: Path, workers: int):
    before = set(threading.enumerate())
    llm = LLM(str(folder), media_workers=workers)
    llm.generate(asked(1), GREEDY, use_tqdm=False)
    pids = llm._front.engine.feeder._pool.worker_pids  # pyright: ignore
    assert len(pids) == workers
    assert set(threading.enumerate()) - before
    del llm
    assert not set(threading.enumerate()) - before
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_lora_request_may_be_none_alone(llm: LLM):
    given: dict[str, Any] = {"use_tqdm": False, "lora_request": None}
    llm.generate("Hello", GREEDY, **given)
    llm.chat([{"role": "user", "content": "Hello"}], GREEDY, **given)
    for call, prompt in ((llm.generate, "Hello"), (llm.chat, [{"role": "user", "content": "Hello"}])):
        with pytest.raises(RequestError, match="merge them into the checkpoint"):
            call(prompt, GREEDY, lora_request=object())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_error_notes_which_prompt_and_which_picture_it_is_about(llm: LLM, return_exceptions: bool):
    pictures = asked(1)["multi_modal_data"]["image"]
    bad: Any = {"prompt": "<image><image>", "multi_modal_data": {"image": [*pictures, b"no picture"]}}
    for prompts, note in (
        ([asked(2), bad], "This is about prompt 1 of 2 (counted from 0), multi_modal_data.image.1."),
        ([bad], "This is about multi_modal_data.image.1."),
    ):
        try:
            *_, error = llm.generate(prompts, GREEDY, use_tqdm=False, return_exceptions=return_exceptions)
        except RequestError as raised:
            error = raised
        assert isinstance(error, RequestError)
        assert error.__notes__ == [note]
    assert_idle(llm)


def test_beam_search_ends_at_the_end_of_the_context(llm: LLM):
    prompt: Any = {"prompt_token_ids": [1] + [20] * 507}  # the context holds 512
    (found,) = llm.beam_search(prompt, BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True))
    assert [len(sequence.tokens) for sequence in found.sequences] == [512, 512]
    assert_idle(llm)


def test_generate_interrupted_while_prompts_are_read_starts_no_more_of_them(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    read_prompt = llm._front.read_prompt
    num_read = 0

    def read(*args: Any) -> Any:
        nonlocal num_read
        num_read += 1
        if num_read == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return read_prompt(*args)

    monkeypatch.setattr(llm._front, "read_prompt", read)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello"] * 20, GREEDY, use_tqdm=False)
    assert num_read == 2
    monkeypatch.undo()
    assert len(llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 4


def test_generate_many_prompts_keeps_no_pictures_in_its_outputs(llm: LLM):
    outputs = llm.generate([asked(seed) for seed in range(33)], GREEDY, use_tqdm=False)
    assert [output.thumbnails for output in outputs] == [None] * 33
    assert "<img" not in outputs[0]._repr_html_()


def test_generate_from_several_threads_takes_turns(llm: LLM):
    prompts = [[asked(10 * thread + i) for i in range(3)] for thread in range(3)]
    alone = [[o.outputs[0].token_ids for o in llm.generate(p, GREEDY, use_tqdm=False)] for p in prompts]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda p: llm.generate(p, GREEDY, use_tqdm=False), prompts * 3))
    assert [[o.outputs[0].token_ids for o in outputs] for outputs in together] == alone * 3


def test_need_of_an_earlier_request_of_the_same_id_takes_no_other_picture(llm: LLM):
    """Needs wait their turn, and a caller may use an id again as soon as its request has ended."""
    pool = _Pool()
    feeder = MediaFeeder(pool)  # pyright: ignore[reportArgumentType]
    front = llm._front
    processed = front.inputs.process("mine", front.read_prompt(asked(21)), GREEDY)
    feeder.hold(processed.request, processed.sources)
    core = _Core([MediaNeed(b"of another picture", "mine", 0), MediaNeed(b"of a second one", "mine", 1)])
    feeder.pump(core)  # pyright: ignore[reportArgumentType]
    assert pool.submitted == []
    core.needs = [MediaNeed(processed.request.media[0].key, "mine", 0)]
    feeder.pump(core)  # pyright: ignore[reportArgumentType]
    assert pool.submitted == [processed.request.media[0].key]


class _Pool:
    def __init__(self) -> None:
        self.submitted: list[Any] = []

    def poll(self) -> list[Any]:
        return []

    def submit(self, job_id: Any, source: Any, plan: Any) -> None:
        self.submitted.append(job_id)


class _Core:
    def __init__(self, needs: list[MediaNeed]) -> None:
        self.needs = needs

    def take_needs(self) -> list[MediaNeed]:
        needs, self.needs = self.needs, []
        return needs
