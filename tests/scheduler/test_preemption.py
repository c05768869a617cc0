"""Who is let in beside those that run, and who of them has to start over. The rig (see conftest) checks every plan."""

from __future__ import annotations

from typing import Any

import pytest

from opsin.params import SamplingParams

LONG = SamplingParams(max_tokens=40)


@pytest.mark.parametrize("depth", [1, 2])
def test_request_waits_while_those_that_run_will_soon_need_its_room(rig_class: Any, make: Any, depth: int) -> None:
    rig = rig_class(num_blocks=17, pipeline_depth=depth)
    early = [make(f"{i}", [i] * 8, SamplingParams(max_tokens=16 + i)) for i in range(2)]  # 6 and 7 of 16 blocks each
    rig.run(*early, make("late", [2] * 20, SamplingParams(max_tokens=4)))  # 5 now, and 6 in the end
    assert dict(rig.scheduler.stats())["num_preemptions_total"] == 0
    assert rig.finished == ["0", "1", "late"] or rig.finished == ["0", "late", "1"]
    opened = [opened.token_ids[0] for plan in rig.plans for opened in plan.opened]
    assert opened == [0, 1, 2]
    first = next(i for i, plan in enumerate(rig.plans) for opened in plan.opened if opened.token_ids[0] == 2)
    assert first >= 16  # it came when the first had ended


def test_request_that_waits_for_room_gets_that_of_later_ones_that_only_wait(rig_class: Any, make: Any) -> None:
    """Blocks leased as hits by requests behind it count as free."""
    rig = rig_class(num_blocks=17, max_num_seqs=2)
    rig.run(make("seed", [3] * 33, SamplingParams(max_tokens=1)))
    rig.add(make("runs", [1] * 4, SamplingParams(max_tokens=20)))
    rig.add(make("next", [2] * 12, SamplingParams(max_tokens=2)))
    rig.add(make("last", [3] * 33, SamplingParams(max_tokens=1)))  # holds 8 of 16 blocks
    rig.drain()
    assert rig.finished.index("next") < rig.finished.index("runs")


def test_urgent_request_does_not_wait_for_the_growth_of_others_less_urgent(rig_class: Any, make: Any) -> None:
    rig = rig_class(policy="priority")
    for i in range(2):
        rig.add(make(f"later {i}", [i] * 8, LONG, priority=5))  # 12 of 32 blocks each, in the end
    rig.step()
    rig.commit()
    rig.add(make("urgent 0", [2] * 8, LONG))
    rig.add(make("urgent 1", [3] * 8, SamplingParams(max_tokens=4)))
    plan = rig.step()
    assert plan is not None
    assert [opened.token_ids[0] for opened in plan.opened] == [2, 3]
    rig.commit()
    rig.drain()
    assert rig.finished[0] == "urgent 1"


@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_takes_the_last_in_line_and_keeps_its_tokens(rig_class: Any, make: Any, depth: int) -> None:
    rig = rig_class(num_blocks=9, max_model_len=24, pipeline_depth=depth)
    rig.run(*(make(f"{i}", [i] * 4, SamplingParams(max_tokens=20)) for i in range(3)))
    assert dict(rig.scheduler.stats())["num_preemptions_total"] > 0
    assert rig.finished == ["0", "1", "2"]
    reopened = [opened for plan in rig.plans for opened in plan.opened if len(opened.token_ids) > 4]
    assert reopened
    assert all(opened.token_ids[:4] == [opened.seed] * 4 for opened in reopened)
    assert all(opened.seed > 0 for opened in reopened)  # the oldest is never preempted


def test_request_that_starts_over_is_not_held_up_by_a_token_set_aside_for_itself(rig_class: Any, make: Any) -> None:
    rig = rig_class(max_num_seqs=2, max_num_batched_tokens=2, policy="priority", enable_prefix_caching=False)
    rig.add(make("oldest", [0], LONG))
    rig.add(make("again", [1, 0], SamplingParams(max_tokens=8)))
    while len(rig.tokens["again"]) < 6:
        rig.step()
        rig.commit()
    rig.add(make("urgent", [1], SamplingParams(max_tokens=1), priority=-1))
    rig.drain()
    assert dict(rig.scheduler.stats())["num_preemptions_total"] == 1
    assert rig.finished == ["urgent", "again", "oldest"]  # its answer is computed again, one token a step, beside LONG


@pytest.mark.parametrize("length", [40, 60, 80])
def test_lease_is_kept_where_giving_it_up_would_not_make_room_enough(rig_class: Any, make: Any, length: int) -> None:
    """Else the picture in it, whose features are gone, would be decoded and encoded again."""
    rig = rig_class(num_blocks=33, feature_bytes=60, max_model_len=128, max_num_batched_tokens=64)
    picture, other = (rig_class.make_item(name, 6, 1, 1) for name in ("picture", "other"))
    rig.run(make("seed", [picture, *([3] * 26)], SamplingParams(max_tokens=1)))
    rig.run(make("evicts", [other], SamplingParams(max_tokens=1)))
    num_encoded = rig.device.num_encoded
    rig.add(make("runs", [1] * 4, SamplingParams(max_tokens=80)))
    rig.add(make("next", [2] * length, SamplingParams(max_tokens=2)))
    rig.add(make("last", [picture, *([3] * 26)], SamplingParams(max_tokens=1)))
    rig.drain()
    assert rig.device.num_encoded == num_encoded
