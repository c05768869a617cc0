"""What is read off prompts on a CUDA device is what a CPU reads: probabilities of answers, vectors of all tokens.

Generation runs beside it, so that rows that draw and rows that are read share steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsin import LLM, AsyncLLM, PoolingParams, SamplingParams
from opsin.outputs import PickOutput
from tests.engine.conftest import asked, picture
from tests.factory import LlavaShape

pytestmark = pytest.mark.gpu

LONG = ["two blue squares", "a red circle", "a red", "Three."]
SMALL: Any = {"dtype": "float32", "kv_cache_memory_bytes": 2**26, "media_workers": 0}


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7}, {"block_size": 4}], ids=str)
def test_values_on_the_device_equal_those_on_the_cpu(
    tiny_llava: Callable[[LlavaShape], Path], settings: dict[str, Any]
):
    folder = str(tiny_llava(LlavaShape(num_kv_heads=2)))
    with LLM(folder, device="cpu", **SMALL) as cpu, LLM(folder, device="cuda", **SMALL, **settings) as gpu:
        for choices in (["1", "2", "3"], LONG):
            truth, found = (llm.pick(picture(1), "What is it?", choices) for llm in (cpu, gpu))
            assert [c.logprob for c in found.choices] == pytest.approx([c.logprob for c in truth.choices], abs=5e-3)
        (truth_TD, found_TD) = (
            llm.encode(asked(2, 3), pooling_task="token_embed", use_tqdm=False)[0].outputs.data for llm in (cpu, gpu)
        )
        assert np.allclose(found_TD, truth_TD, atol=2e-3)


def test_values_beside_replayed_decode_steps_are_the_same(tiny_llava: Callable[[LlavaShape], Path]):
    async def run() -> tuple[PickOutput, PickOutput, Any, Any]:
        with AsyncLLM(str(tiny_llava(LlavaShape(num_kv_heads=2))), device="cuda", **SMALL) as engine:

            async def text() -> list[int]:
                params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
                return [o.outputs[0].token_ids async for o in engine.generate(asked(4), params)][-1]

            alone, alone_ids = await engine.pick(picture(1), "What is it?", LONG), await text()
            vectors = PoolingParams(task="token_embed")
            answers = await asyncio.gather(
                text(), engine.pick(picture(1), "What is it?", LONG), engine.embed(asked(2), vectors)
            )
            return alone, answers[1], alone_ids, answers[0]

    alone, together, alone_ids, together_ids = asyncio.run(run())
    assert [c.logprob for c in together.choices] == pytest.approx([c.logprob for c in alone.choices], abs=5e-3)
    assert together_ids == alone_ids
