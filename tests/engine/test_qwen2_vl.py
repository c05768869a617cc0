"""Where a family's pictures grow with their size, as Qwen2-VL's do: what an engine measures at its start, and how far
they may grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsin import LLM, RequestError, SamplingParams
from opsin.engine.build import _CPU_MEASURED_SIDE, fill_budget
from opsin.models.qwen2_vl.rule import Qwen2VLRule
from tests.engine.conftest import picture
from tests.factories import qwen2_vl
from tests.factories.qwen2_vl import Qwen2VLShape


def test_fill_budget_measures_what_a_cpu_can_run_in_time():
    """Of 1024 x 1024 pixels a checkpoint of the hub would make 5,476 patches, of which a CPU takes minutes."""

    class Tokenizer:
        def convert_tokens_to_ids(self, token: str) -> int:
            return 7

    rule = Qwen2VLRule.from_hf({"image_token_id": 7}, {"min_pixels": 3136, "max_pixels": 12845056}, Tokenizer())
    assert [layout.num_patches for layout in fill_budget(rule, 4096, _CPU_MEASURED_SIDE, {})] == [1024] * 4
    assert [layout.num_patches for layout in fill_budget(rule, 500, _CPU_MEASURED_SIDE, {})] == [1024]


def test_most_pixels_are_said_per_engine_request_and_picture(tmp_path: Path):
    """Each over the one before; the same picture three times."""
    image, unit = picture(1, 64, 64), 16 * 16  # pixels of a feature
    prompt: Any = {"prompt": 3 * qwen2_vl.IMAGE, "multi_modal_data": {"image": [image] * 3}}
    part: Any = {"type": "image_pil", "image_pil": image}
    own = {"max_pixels": unit}
    once = SamplingParams(max_tokens=1)
    engine: Any = {"mm_processor_kwargs": {"max_pixels": 9 * unit}, "media_workers": 0}
    with LLM(str(qwen2_vl.write_qwen2_vl(tmp_path, Qwen2VLShape())), **engine) as llm:
        image_token_id = llm._front.inputs.rule.image_token_id  # type: ignore[attr-defined]

        def features(outputs: list[Any]) -> int:
            return outputs[0].prompt_token_ids.count(image_token_id)

        assert features(llm.generate(prompt, once, use_tqdm=False)) == 9 + 9 + 9
        four = {"max_pixels": 4 * unit}
        for given, expected in ((four, 4 + 4 + 4), ([None, own, four], 9 + 1 + 4)):
            asked = prompt | {"mm_processor_kwargs": given}
            assert features(llm.generate(asked, once, use_tqdm=False)) == expected
        content: Any = [part, part | {"mm_processor_kwargs": own}]
        chat: Any = {"mm_processor_kwargs": four, "use_tqdm": False}
        assert features(llm.chat([{"role": "user", "content": content}], once, **chat)) == 4 + 1
        for wrong in ([own], [own, own, 4]):
            with pytest.raises(RequestError, match="each of the 3 pictures"):
                llm.generate(prompt | {"mm_processor_kwargs": wrong}, once, use_tqdm=False)
