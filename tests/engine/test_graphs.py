"""Whole engines with graphs give the tokens and vectors of engines without: padded rows and tokens, features, two steps
in flight, preemption, aborts. No GPU is needed; ``tests.runner.recorded`` stands for its graphs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM, AsyncLLM, PoolingParams, SamplingParams
from opsin.models import load
from opsin.runner import graphs, runner
from opsin.runner.runner import ModelRunner
from opsin.runner.tower import EagerTower, ReplayedTower
from tests.engine.conftest import asked, assert_idle, everybody_let_in, picture
from tests.factories.families import FAMILIES
from tests.factories.family import Family
from tests.factories.phi3_v import Phi3VShape, write_phi3_v
from tests.factories.qwen2_vl import Qwen2VLShape, write_qwen2_vl
from tests.factory import LlavaShape
from tests.runner.recorded import KERNELS, Recorder

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True, logprobs=2)
PREFILLS = (16, 64, 160)  # and the largest that there can be
AT_LENGTH = "Describe the colours of everything that you can see, at length, please."
SHARED: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 6, "max_model_len": 512, "media_workers": 0}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Engines made from now on have graphs, unless they are told ``enforce_eager``. All graphs lie here."""
    recorder: Any = Recorder()

    def capture_graphs(self: ModelRunner, max_tokens: int, max_patches: int) -> None:
        self.vision.tower = ReplayedTower(EagerTower(self.model, self.device), recorder.record, max_patches)
        with torch.inference_mode():
            self._graphs = self._step_graphs(max_tokens, recorder.record)
            self._graphs.capture_first()

    for module in (load, runner):
        monkeypatch.setattr(module, "select", lambda *_: KERNELS)
    monkeypatch.setattr(
        graphs, "prefill_sizes", lambda max_tokens: [size for size in PREFILLS if size < max_tokens] + [max_tokens]
    )
    monkeypatch.setattr(ModelRunner, "capture_graphs", capture_graphs)
    return recorder


def prompts(family: Family, seed: int) -> list[Any]:
    found: list[Any] = []
    for i, sizes in enumerate(family.asked):
        if not sizes:
            found.append("Only text here.")
            continue
        images = [picture(seed + 10 * i + j, *size) for j, size in enumerate(sizes)]
        text = AT_LENGTH if i == 3 else "What is this?"
        found.append(
            {"prompt": f"USER: {family.signs(len(sizes))}\n{text} ASSISTANT:", "multi_modal_data": {"image": images}}
        )
    return found


def step_graphs(llm: LLM) -> Any:
    engine: Any = llm._front.engine
    return engine.core.executor._runner._graphs


def answers(llm: LLM, prompts: list[Any], params: SamplingParams) -> list[Any]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [(output.outputs[0].token_ids, output.outputs[0].finish_reason) for output in outputs]


CASES = [pytest.param(family, id=family.name) for family in FAMILIES]


@pytest.fixture(params=CASES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def folder(family: Family, tmp_path: Path) -> Path:
    return family.write(tmp_path, family.shapes[family.served[0]])


def budgets(family: Family) -> Iterator[dict[str, Any]]:
    yield {"pipeline_depth": 2}
    yield {"pipeline_depth": 1, "max_num_batched_tokens": family.least_step}
    yield {"pipeline_depth": 2, "block_size": 4, "num_gpu_blocks_override": family.num_blocks}


def test_engine_with_graphs_gives_the_tokens_of_one_without(recorder: Recorder, family: Family, folder: Path):
    rounds = [(prompts(family, seed), params) for seed, params in ((0, GREEDY), (100, DRAWN))]
    # New pictures of a known size, one at a time: the first is launched, the second captured, the others replayed.
    alone = [[prompts(family, seed)[0]] for seed in (200, 300, 400, 500)]
    with LLM(str(folder), **SHARED, enforce_eager=True) as llm:
        expected = [answers(llm, *each) for each in rounds]
        expected_alone = [answers(llm, each, GREEDY) for each in alone]
    for settings in budgets(family):
        recorder.graphs.clear()
        with LLM(str(folder), **SHARED, **settings) as llm:
            assert [answers(llm, *each) for each in rounds] == expected, settings
            if settings == {"pipeline_depth": 2}:
                assert [answers(llm, each, GREEDY) for each in alone] == expected_alone
                replayed = {id(graph) for graph in recorder.graphs if graph.num_replays}
                graphs_of = step_graphs(llm)
                prefills, decodes = (
                    {id(captured.graph) for captured in sizes.values()}
                    for sizes in (graphs_of._prefill, graphs_of._decode)
                )
                assert bool(replayed & prefills) != family.is_prefix_lm
                assert len(replayed & decodes) > 1
                assert replayed - prefills - decodes, "no tower was replayed"
            assert_idle(llm)


def test_preempted_requests_give_the_same_tokens_with_graphs(recorder: Recorder, tiny_llava: Callable[..., Path]):
    folder = str(tiny_llava(LlavaShape(num_kv_heads=2)))
    asked = [f"Number {i}: what is it?" for i in range(6)]
    with LLM(folder, **SHARED, enforce_eager=True) as llm:
        expected = answers(llm, asked, GREEDY)
    with LLM(folder, **SHARED, pipeline_depth=2, block_size=4, num_gpu_blocks_override=24) as llm:
        with everybody_let_in():
            assert answers(llm, asked, GREEDY) == expected
        assert llm.stats()["num_preemptions_total"] > 0
        assert_idle(llm)
    assert any(graph.num_replays for graph in recorder.graphs)


def test_prompts_read_token_by_token_give_the_same_answers_with_graphs(
    recorder: Recorder, tiny_llava: Callable[..., Path]
):
    folder = str(tiny_llava(LlavaShape(num_kv_heads=2)))
    prompts = ["Only text here.", "And there, too."]
    with LLM(folder, **SHARED, enforce_eager=True) as llm:
        expected = answers(llm, prompts, GREEDY)
    with LLM(folder, **SHARED, max_num_batched_tokens=1, limit_mm_per_prompt={"image": 0}) as llm:
        assert answers(llm, prompts, GREEDY) == expected
        assert any(captured.graph.num_replays for captured in step_graphs(llm)._prefill.values())


def test_graphs_over_a_cache_of_8_bits_give_the_tokens_of_steps_over_one(
    recorder: Recorder, tiny_llava: Callable[..., Path]
):
    folder = str(tiny_llava(LlavaShape(num_kv_heads=2)))
    prompts = [asked(1), asked(2, 3), "Only text here.", asked(4, text="Describe it.")]
    found: list[Any] = []
    for settings in ({"enforce_eager": True}, {"pipeline_depth": 2}, {"max_num_batched_tokens": 7}):
        options: Any = {**SHARED, **settings, "kv_cache_dtype": "fp8"}
        with LLM(folder, **options) as llm:
            found.append(answers(llm, prompts, GREEDY))
            assert_idle(llm)
    assert found[1:] == found[:1] * 2
    assert any(graph.num_replays for graph in recorder.graphs)


def test_requests_that_leave_do_not_disturb_the_others(recorder: Recorder, tiny_llava: Callable[..., Path]):
    """A stream is left while two steps are in flight, so that a row that nobody wants any more is still replayed."""
    folder = str(tiny_llava(LlavaShape(num_kv_heads=2)))

    async def run(engine: AsyncLLM) -> list[list[int]]:
        async def read(seed: int) -> list[int]:
            stream = engine.generate(asked(seed, text="Describe it."), GREEDY)
            tokens: list[int] = []
            async for output in stream:
                tokens = output.outputs[0].token_ids
                if seed % 2 and len(tokens) >= 2:
                    break
            await stream.aclose()
            return tokens

        found = await asyncio.gather(*(read(seed) for seed in range(9)))
        return found[::2]

    eager: Any = SHARED | {"enforce_eager": True}
    with AsyncLLM(folder, **eager) as engine:
        expected = asyncio.run(run(engine))
    assert all(len(tokens) == GREEDY.max_tokens for tokens in expected)
    with AsyncLLM(folder, **SHARED, pipeline_depth=2) as engine:
        assert asyncio.run(run(engine)) == expected
    assert any(graph.num_replays for graph in recorder.graphs)


def test_vectors_with_graphs_equal_those_without(recorder: Recorder, tmp_path: Path):
    folder = write_qwen2_vl(tmp_path, Qwen2VLShape(tied=True))
    messages: Any = [
        {"content": [{"type": "image_pil", "image_pil": picture(i, 56, 84)}, {"type": "text", "text": "a " * (i + 1)}]}
        for i in range(4)
    ]
    found: list[list[Any]] = []
    for settings in ({"enforce_eager": True}, {"pipeline_depth": 2}):
        options: Any = {**SHARED, **settings, "runner": "pooling", "chat_template": "dse_qwen2_vl"}
        with LLM(str(folder), **options) as llm:
            outputs = [llm.embed(some, PoolingParams(), use_tqdm=False) for some in (messages[:1], messages)]
            if recorder.graphs:
                assert any(captured.graph.num_replays for captured in step_graphs(llm)._prefill.values())
            found.append([output.outputs.embedding for output in outputs[0] + outputs[1]])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-4, atol=1e-5)


def test_longrope_with_short_and_long_factors_is_the_same_with_graphs(recorder: Recorder, tmp_path: Path):
    """Which factors are taken depends on max_model_len alone, so no step needs others than were captured."""
    folder = write_phi3_v(tmp_path, Phi3VShape())
    told: list[Any] = []
    for max_model_len in (64, 512):
        for settings in ({"enforce_eager": True}, {"pipeline_depth": 2}):
            options: Any = {**SHARED, **settings, "max_model_len": max_model_len}
            with LLM(str(folder), **options) as llm:
                outputs = llm.generate(["What is it?", "And this, there?"], DRAWN, use_tqdm=False)
                told.append([(x.outputs[0].token_ids, x.outputs[0].cumulative_logprob) for x in outputs])
    short, short_graphs, long, long_graphs = told
    for got, expected in ((short_graphs, short), (long_graphs, long)):
        for (ids, logprob), (expected_ids, expected_logprob) in zip(got, expected, strict=True):
            assert ids == expected_ids
            assert logprob == pytest.approx(expected_logprob, abs=1e-4)
    assert short != long


def test_step_that_cannot_be_captured_is_padded_to_one_that_was(recorder: Recorder, tiny_llava: Callable[..., Path]):
    """No memory is left for another graph while the engine serves."""
    folder = str(tiny_llava(LlavaShape(num_kv_heads=2)))
    prompts = [asked(1), asked(2, 3), "Only text here.", asked(4, text="Describe it.")]
    with LLM(folder, **SHARED, enforce_eager=True) as llm:
        expected = answers(llm, prompts, GREEDY)
    with LLM(folder, **SHARED, pipeline_depth=2) as llm:
        graphs_of = step_graphs(llm)
        largest = list(graphs_of._prefill)

        def refuse(size: int, num_rows: int, *, warm_up: bool) -> Any:
            raise RuntimeError("out of memory")

        graphs_of._capture_prefill = refuse
        assert answers(llm, prompts, GREEDY) == expected
        assert list(graphs_of._prefill) == largest
        assert graphs_of._prefill[largest[0]].graph.num_replays
