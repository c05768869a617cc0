"""``AsyncLLM.spawn``: the same answers, from a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opsin import AsyncLLM, SamplingParams
from opsin.errors import EngineRestartError, MediaError, RequestError, UnsupportedModelError
from opsin.params import StructuredOutputsParams
from opsin.processing import grammar_prober
from tests.engine.conftest import picture
from tests.processing.test_grammar_prober import ENDLESS

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def spawned(folder: Path) -> Iterator[AsyncLLM]:
    with AsyncLLM.spawn(str(folder), media_workers=1) as engine:
        yield engine


async def last(engine: AsyncLLM, prompt: Any, params: SamplingParams = GREEDY) -> Any:
    return [output async for output in engine.generate(prompt, params, output_kind="final")][-1]


def asked(seed: int) -> Any:
    return {"prompt": "USER: <image>\nWhat? ASSISTANT:", "multi_modal_data": {"image": picture(seed)}}


def test_answers_are_those_of_the_engine_in_this_process(spawned: AsyncLLM, folder: Path):
    prompts: list[tuple[Any, SamplingParams]] = [
        ("Hello", GREEDY),
        (asked(1), GREEDY),
        (asked(2), SamplingParams(temperature=1, seed=7, n=3, max_tokens=6, logprobs=2)),
        (asked(2), SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)),
    ]

    async def all_of(engine: AsyncLLM) -> list[Any]:
        outputs = await asyncio.gather(*(last(engine, prompt, params) for prompt, params in prompts))
        vector = await engine.embed(asked(3))
        return [
            [(o.prompt_token_ids, [(a.text, a.token_ids, a.finish_reason) for a in o.outputs]) for o in outputs],
            [[(sorted(p) if p else None) for p in o.prompt_logprobs or ()] for o in outputs],
            [round(value, 4) for value in vector.outputs.embedding],
        ]

    there = asyncio.run(all_of(spawned))
    with AsyncLLM(str(folder), media_workers=1) as engine:
        assert there == asyncio.run(all_of(engine))


def test_one_callers_mistakes_are_told_as_they_are_here(spawned: AsyncLLM):
    broken = picture(4)

    async def run() -> None:
        with pytest.raises(RequestError, match="placeholder"):
            await last(spawned, {"prompt": "none", "multi_modal_data": {"image": broken}})
        with pytest.raises(MediaError):
            await last(spawned, {"prompt": "<image>", "multi_modal_data": {"image": b"\x89PNG\r\n\x1a\nnothing"}})
        assert (await last(spawned, "Hello")).finished

    asyncio.run(run())


def test_what_the_scheduler_refuses_is_the_callers_mistake_there_too(folder: Path):
    with AsyncLLM.spawn(str(folder), media_workers=1, max_num_batched_patches=1, vision_cache_gb=1e-9) as engine:
        with pytest.raises(RequestError) as refusal:
            asyncio.run(last(engine, asked(1)))
        assert refusal.value.code is None
        assert asyncio.run(last(engine, "Hello")).finished


def test_leaving_a_stream_aborts_there_and_facts_are_known_here(spawned: AsyncLLM):
    async def run() -> None:
        stream = spawned.generate("Hello", SamplingParams(max_tokens=400, ignore_eos=True, n=4))
        await anext(stream)
        await stream.aclose()
        while spawned.stats()["num_requests_running"] or spawned.stats()["kv_blocks_used"]:
            await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert spawned.facts.device == "cpu"
    assert spawned.memory_plan.kv_bytes > 0
    assert spawned.picture_tokens(64, 48) > 0
    assert spawned.histograms()["iteration_tokens"].total > 0


def test_form_that_takes_for_ever_to_compile_costs_its_own_request_alone(
    spawned: AsyncLLM, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grammar_prober, "MAX_CPU_S", 0.6)
    hostile = [
        SamplingParams(structured_outputs=StructuredOutputsParams(json=ENDLESS, whitespace_pattern=f"[ ]{{0,{i + 1}}}"))
        for i in range(6)  # more than there are threads of any kind
    ]

    async def run() -> None:
        waiting = [asyncio.create_task(last(spawned, "Hello", params)) for params in hostile]
        await asyncio.sleep(0)
        for seed in (1, 2):
            assert (await last(spawned, asked(seed))).finished
        assert not any(task.done() for task in waiting)
        refusals = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, RequestError) and "to compile" in str(error) for error in refusals), refusals
        form = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes"]))
        assert (await last(spawned, "Hello", form)).outputs[0].text == "yes"

    asyncio.run(run())


def test_process_that_is_killed_is_replaced_and_answers_alike(spawned: AsyncLLM):
    async def run() -> None:
        before = await last(spawned, asked(5))
        engine: Any = spawned._front.engine
        stream = spawned.generate("Hello", SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(stream)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineRestartError):
            async for _ in stream:
                pass
        assert not spawned.is_ready
        assert spawned.is_running
        with pytest.raises(EngineRestartError):
            await last(spawned, "Hello")
        while not spawned.is_ready:
            await asyncio.sleep(0.02)
        after = await last(spawned, asked(5))
        assert after.outputs[0].token_ids == before.outputs[0].token_ids
        assert after.num_cached_tokens == 0  # nothing is believed of the old process

    asyncio.run(asyncio.wait_for(run(), 60))


def test_model_that_is_not_supported_costs_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(UnsupportedModelError, match="NoSuchModel"):
        AsyncLLM.spawn(str(tmp_path))


def test_front_is_imported_without_torch_and_runner():
    code = (
        "import sys, opsin.engine.spawn, opsin.async_llm, opsin.server.app, opsin.server.run;"
        "print(sorted({'torch', 'transformers', 'opsin.runner.runner'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"
