"""``AsyncLLM``: streams, aborts, failures, shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opsin import AsyncLLM, EngineDeadError, RequestError, SamplingParams
from opsin.engine.thread import _Caller
from opsin.outputs import CompletionOutput, RequestOutput
from opsin.params import StructuredOutputsParams
from tests.engine.conftest import asked

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[AsyncLLM]:
    with AsyncLLM(str(folder), media_workers=0) as engine:
        yield engine


async def collect(engine: AsyncLLM, prompt: Any, kind: Any = "cumulative", request_id: str | None = None):
    stream = engine.generate(prompt, GREEDY, request_id, output_kind=kind)
    return [output.outputs[0] async for output in stream]


async def idle(engine: AsyncLLM) -> bool:
    """Whether everything has come back, given the engine's thread a moment to notice what was posted."""
    for _ in range(200):
        stats = engine._front.engine.stats()
        if not (stats["num_requests_running"] or stats["num_requests_waiting"] or stats["kv_blocks_used"]):
            return True
        await asyncio.sleep(0.01)
    return False


def test_stream_deltas_join_to_the_cumulative_and_final_text(engine: AsyncLLM):
    async def run():
        return await asyncio.gather(*(collect(engine, asked(1), kind) for kind in ("delta", "cumulative", "final")))

    delta, cumulative, final = asyncio.run(run())
    assert len(final) == 1
    assert len(cumulative) > 1
    assert "".join(part.text for part in delta) == cumulative[-1].text == final[0].text
    assert [i for part in delta for i in part.token_ids] == cumulative[-1].token_ids == final[0].token_ids
    assert final[0].finish_reason == "length"


def test_deltas_that_wait_are_joined_and_those_that_do_not_are_told_one_by_one(engine: AsyncLLM):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)

    async def run(lags: bool):
        parts: list[CompletionOutput] = []
        async for output in engine.generate(asked(1), params, output_kind="delta"):
            parts += output.outputs
            assert not lags or await idle(engine)
        return parts

    joined, single = asyncio.run(run(True)), asyncio.run(run(False))
    assert len(joined) <= 3
    assert "".join(part.text for part in joined) == "".join(part.text for part in single)
    assert [i for part in joined for i in part.token_ids] == [i for part in single for i in part.token_ids]
    assert [p for part in joined for p in part.logprobs or ()] == [p for part in single for p in part.logprobs or ()]
    assert joined[-1].cumulative_logprob == single[-1].cumulative_logprob
    assert joined[-1].finish_reason == "length"


def test_deltas_that_wait_before_a_failure_are_told_before_it():
    def delta(text: str) -> RequestOutput:
        return RequestOutput("r", None, [1], None, [CompletionOutput(0, text, [2])], finished=False)

    async def run():
        caller = _Caller(asyncio.get_running_loop())
        for item in (delta("a"), delta("b"), delta("c"), RequestError("broken")):
            caller.put(item)
        first = await caller.get()
        assert isinstance(first, RequestOutput)
        return caller.with_waiting(first), await caller.get()

    joined, failure = asyncio.run(run())
    assert joined.outputs == [CompletionOutput(0, "abc", [2, 2, 2])]
    assert isinstance(failure, RequestError)


def test_stream_left_early_is_aborted_and_the_rest_goes_on(engine: AsyncLLM):
    async def leave():
        stream = engine.generate(asked(2), GREEDY)
        async for output in stream:
            if len(output.outputs[0].token_ids) >= 2:
                break
        await stream.aclose()

    async def run():
        _, other = await asyncio.gather(leave(), collect(engine, asked(3)))
        return other[-1], await idle(engine)

    other, is_idle = asyncio.run(run())
    assert len(other.token_ids) == 24
    assert is_idle


def test_abort_ends_the_stream_with_its_reason(engine: AsyncLLM):
    async def run():
        last = None
        async for output in engine.generate(asked(4), GREEDY, "mine"):
            last = output.outputs[0]
            if len(last.token_ids) == 2:
                await engine.abort("mine")
        await engine.abort("mine")  # late
        await engine.abort("never seen")
        return last, await idle(engine)

    last, is_idle = asyncio.run(run())
    assert last is not None
    assert last.finish_reason == "abort"
    assert len(last.token_ids) < 24
    assert is_idle


def test_cancelled_task_aborts_its_request(engine: AsyncLLM):
    async def run():
        task = asyncio.create_task(collect(engine, asked(5)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await idle(engine)

    assert asyncio.run(run())


def test_bad_prompt_raises_for_its_caller_alone(engine: AsyncLLM):
    async def run():
        return await asyncio.gather(
            collect(engine, {"prompt": "<image>"}), collect(engine, asked(6)), return_exceptions=True
        )

    bad, good = asyncio.run(run())
    assert isinstance(bad, RequestError)
    assert not isinstance(good, BaseException)
    assert len(good[-1].token_ids) == 24


def test_request_id_in_use_is_refused(engine: AsyncLLM):
    async def run():
        return await asyncio.gather(
            *(collect(engine, asked(7), request_id="same") for _ in range(2)), return_exceptions=True
        )

    (refused,) = [result for result in asyncio.run(run()) if isinstance(result, BaseException)]
    assert isinstance(refused, RequestError)


def test_shutdown_ends_running_streams_and_refuses_new_ones(folder: Path):
    engine = AsyncLLM(str(folder), media_workers=0)

    async def run():
        errors = []
        try:
            async for _ in engine.generate(asked(8), SamplingParams(max_tokens=400, ignore_eos=True)):
                await asyncio.to_thread(engine.shutdown)
        except EngineDeadError as error:
            errors.append(error)
        try:
            await collect(engine, asked(9))
        except EngineDeadError as error:
            errors.append(error)
        return errors

    assert len(asyncio.run(run())) == 2
    engine.shutdown()  # twice is once


def test_engine_that_is_shut_down_refuses_a_form_that_nobody_has_compiled(folder: Path):
    with AsyncLLM(str(folder), media_workers=0) as engine:
        pass
    form = StructuredOutputsParams(regex="[xyz]{3}")
    with pytest.raises(EngineDeadError):
        asyncio.run(engine.prepare(asked(1), SamplingParams(structured_outputs=form)))


def test_failing_step_tells_every_caller(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    engine = AsyncLLM(str(folder), media_workers=0)

    def broken(plan):
        raise RuntimeError("kernel fault")

    core: Any = engine._front.engine
    monkeypatch.setattr(core.core.executor, "launch", broken)

    async def run():
        return await asyncio.gather(*(collect(engine, asked(i)) for i in range(3)), return_exceptions=True)

    results = asyncio.run(run())
    assert all(isinstance(result, EngineDeadError) for result in results)
    engine.shutdown()


def test_wrong_kind_of_params_is_refused_in_words(engine: AsyncLLM):
    wrong: Any = {"max_tokens": 4}

    async def run():
        async for _ in engine.generate(asked(1), wrong):
            pass

    with pytest.raises(RequestError, match="must be SamplingParams, got dict"):
        asyncio.run(run())
