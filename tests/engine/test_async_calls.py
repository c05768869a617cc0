"""``AsyncLLM`` under calls that nobody foresaw: odd arguments, ids used again, requests that come as it stops."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opsin import AsyncLLM, ConfigError, EngineDeadError, RequestError, SamplingParams
from opsin.outputs import CompletionOutput
from tests.engine.conftest import asked

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[AsyncLLM]:
    with AsyncLLM(str(folder), media_workers=0) as engine:
        yield engine


async def collect(engine: AsyncLLM, prompt: Any, request_id: str | None = None) -> list[CompletionOutput]:
    return [output.outputs[0] async for output in engine.generate(prompt, GREEDY, request_id)]


@pytest.mark.parametrize(
    "prompt",
    [{**asked(1), "mm_processor_kwargs": {"resample": object()}}, "half a pair: \ud83d"],
    ids=["options", "text"],
)
def test_arguments_that_nobody_foresaw_fail_their_caller_alone(engine: AsyncLLM, prompt: Any):
    async def run():
        return await asyncio.gather(collect(engine, prompt), collect(engine, asked(6)), return_exceptions=True)

    bad, good = asyncio.run(run())
    assert isinstance(bad, Exception)
    assert not isinstance(bad, EngineDeadError)
    assert not isinstance(good, BaseException)
    assert len(good[-1].token_ids) == 24


def test_request_id_of_an_aborted_request_can_be_used_at_once(engine: AsyncLLM):
    async def run():
        for _ in range(3):
            stream = engine.generate(asked(10), GREEDY, "again")
            async for output in stream:
                if len(output.outputs[0].token_ids) >= 2:
                    break
            await stream.aclose()
        return await collect(engine, asked(10), request_id="again")

    answer = asyncio.run(run())[-1]
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 24


def test_request_posted_behind_the_shutdown_is_told(folder: Path):
    engine = AsyncLLM(str(folder), media_workers=0)
    asked_to_stop = threading.Event()

    def wait() -> None:
        asked_to_stop.wait(10)

    async def run():
        engine._thread.post(wait)
        engine._thread.post(None)
        late = asyncio.create_task(collect(engine, asked(12)))
        await asyncio.sleep(0)  # it is posted, and then waits
        asked_to_stop.set()
        return await asyncio.gather(asyncio.wait_for(late, 10), return_exceptions=True)

    (error,) = asyncio.run(run())
    assert isinstance(error, EngineDeadError)
    engine.shutdown()


@pytest.mark.parametrize("priority", ["high", None, 1.5])
def test_priority_that_is_no_number_does_not_reach_the_line(folder: Path, priority: Any):
    async def ask(engine: AsyncLLM, level: Any) -> int:
        return len([o async for o in engine.generate("Hello", GREEDY, priority=level, output_kind="final")])

    async def run(engine: AsyncLLM):
        levels = (2, priority, 1)
        return await asyncio.gather(*(ask(engine, level) for level in levels), return_exceptions=True)

    with AsyncLLM(str(folder), media_workers=0, scheduling_policy="priority") as engine:
        first, wrong, last = asyncio.run(run(engine))
    assert (first, last) == (1, 1)
    assert isinstance(wrong, RequestError)
    assert wrong.param == "priority"


def test_pictures_are_decoded_outside_the_engine_by_default(folder: Path):
    with AsyncLLM(str(folder)) as engine:
        asyncio.run(collect(engine, asked(13)))
        inner: Any = engine._front.engine
        assert inner.feeder._pool.worker_pids


def test_settings_that_vllm_alone_has_are_accepted_or_refused_as_those_of_llm(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    settings: Any = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 2, "audio": 0}, "seed": None}
    with caplog.at_level(logging.WARNING, logger="opsin"), AsyncLLM(str(folder), media_workers=0, **settings) as engine:
        outputs = asyncio.run(collect(engine, asked(13)))
    assert outputs
    assert "enable_mm_embeds" in caplog.text
    other: Any = {"enable_lora": True}
    with pytest.raises(ConfigError, match="enable_lora"):
        AsyncLLM(str(folder), **other)
