"""What an engine measures at its start where a family's pictures grow with their size, as Qwen2-VL's do."""

from __future__ import annotations

from opsin.engine.build import _CPU_MEASURED_SIDE, fill_budget
from opsin.models.qwen2_vl.rule import Qwen2VLRule


def test_fill_budget_measures_what_a_cpu_can_run_in_time():
    """Of 1024 x 1024 pixels a checkpoint of the hub would make 5,476 patches, of which a CPU takes minutes."""

    class Tokenizer:
        def convert_tokens_to_ids(self, token: str) -> int:
            return 7

    rule = Qwen2VLRule.from_hf({"image_token_id": 7}, {"min_pixels": 3136, "max_pixels": 12845056}, Tokenizer())
    assert [layout.num_patches for layout in fill_budget(rule, 4096, _CPU_MEASURED_SIDE, {})] == [1024] * 4
    assert [layout.num_patches for layout in fill_budget(rule, 500, _CPU_MEASURED_SIDE, {})] == [1024]
