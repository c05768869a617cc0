"""The scheduler's rules, one by one. The rig (see conftest) checks every plan on the way."""

from __future__ import annotations

from typing import Any

import pytest

from opsin.errors import ContextLengthError, RequestError
from opsin.params import PoolingParams, SamplingParams
from opsin.types import StepPlan

LONG = SamplingParams(max_tokens=40)


@pytest.fixture
def picture(rig_class: Any) -> Any:
    return rig_class.make_item("picture", 6, 10, 30)


def rows(plan: StepPlan | None) -> list[tuple[int, int]]:
    assert plan is not None
    return [(row.start, row.num_tokens) for row in plan.rows]


# ------------------------------------------------------------------------------------------- refusals


def test_add_prompt_as_long_as_the_context_is_refused(rig_class: Any, make: Any) -> None:
    rig = rig_class(max_model_len=16)
    with pytest.raises(ContextLengthError, match=r"16 tokens; the context \(max_model_len\) holds 16"):
        rig.add(make("a", [0] * 16))
    rig.run(make("a", [0] * 15), make("pooled", [0] * 16, PoolingParams()))


def test_add_prompt_larger_than_the_pool_is_refused(rig_class: Any, make: Any) -> None:
    with pytest.raises(ContextLengthError, match="all KV blocks together hold 12"):
        rig_class(num_blocks=4, block_size=4).add(make("a", [0] * 20))


def test_add_item_larger_than_the_feature_cache_is_refused(rig_class: Any, make: Any, picture: Any) -> None:
    with pytest.raises(RequestError, match="needs 60 bytes of vision features at once; the cache has 50"):
        rig_class(feature_bytes=50).add(make("a", [picture]))


def test_add_items_that_only_together_exceed_the_feature_cache_run_one_by_one(rig_class: Any, make: Any) -> None:
    rig = rig_class(feature_bytes=60)
    rig.run(make("a", [rig_class.make_item(f"{i}", 6, 1, 1) for i in range(4)]))
    assert rig.device.num_encoded == 4


def test_add_items_of_one_range_larger_than_the_feature_cache_are_refused(rig_class: Any, make: Any) -> None:
    items = [rig_class.make_item(f"{i}", 6, 1, 1) for i in range(2)]
    with pytest.raises(RequestError, match="needs 120 bytes of vision features at once"):
        rig_class(feature_bytes=100).add(make("a", items, bidirectional=True, joined=True))


def test_add_range_larger_than_a_step_is_refused(rig_class: Any, make: Any, picture: Any) -> None:
    with pytest.raises(RequestError, match=r"6 tokens that must run in one step.*max_num_batched_tokens=5"):
        rig_class(max_num_batched_tokens=5).add(make("a", [picture], bidirectional=True))


def test_add_empty_prompt_or_id_in_use_is_refused(rig_class: Any, make: Any) -> None:
    rig = rig_class()
    with pytest.raises(RequestError, match="empty"):
        rig.scheduler.add(make("a", []))
    rig.run(make("a", [1]))
    rig.scheduler.add(make("a", [1]))  # the first one is over
    with pytest.raises(RequestError, match="'a' is in use"):
        rig.scheduler.add(make("a", [1]))


# ------------------------------------------------------------------------------------------------ ends


@pytest.mark.parametrize("depth", [1, 2])
def test_stop_token_ends_the_answer_and_is_included(rig_class: Any, make: Any, depth: int) -> None:
    rig = rig_class(pipeline_depth=depth)
    probe = make("probe", [3, 4], SamplingParams(max_tokens=8))
    rig.run(probe)
    third = rig.tokens["probe"][2]
    first_at = rig.tokens["probe"].index(third)
    rig.run(make("a", [3, 4], SamplingParams(max_tokens=8), stop_token_ids=frozenset({third})))
    assert rig.tokens["a"] == rig.tokens["probe"][: first_at + 1]
    assert (rig.ends["a"].finish_reason, rig.ends["a"].stop_token_id) == ("stop", third)


def test_stop_token_before_min_tokens_is_not_honoured(rig_class: Any, make: Any) -> None:
    rig = rig_class()
    everything = frozenset(range(13))
    rig.run(make("a", [3], SamplingParams(max_tokens=9, min_tokens=4), stop_token_ids=everything))
    assert len(rig.tokens["a"]) == 5


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, 1), (5, 5), (None, 14), (40, 14)])
@pytest.mark.parametrize("depth", [1, 2])
def test_length_is_never_exceeded_not_even_in_flight(
    rig_class: Any, make: Any, depth: int, max_tokens: int | None, expected: int
) -> None:
    rig = rig_class(pipeline_depth=depth, max_model_len=16)
    rig.run(make("a", [0, 1], SamplingParams(max_tokens=max_tokens)))
    assert len(rig.tokens["a"]) == expected
    assert rig.ends["a"].finish_reason == "length"
    assert sum(len(plan.rows) for plan in rig.plans) == expected  # no zombie for an end known by count


def test_late_stop_makes_a_zombie_whose_slot_and_blocks_go_on_at_once(rig_class: Any, make: Any) -> None:
    rig = rig_class(pipeline_depth=2, max_num_seqs=1)
    rig.add(make("a", [0, 1], stop_token_ids=frozenset(range(13))))
    rig.add(make("b", [1, 1, 1]))
    rig.step()
    assert rows(rig.step()) == [(2, 1)]  # planned before the stop is known
    assert [update.finish_reason for update in rig.commit()] == ["stop"]
    plan = rig.step()
    assert rows(plan) == [(0, 3)]
    assert plan.rows[0].slot == rig.plans[0].rows[0].slot
    assert rig.commit() == []  # the zombie
    rig.drain()


def test_abort_unknown_twice_or_late_is_none(rig_class: Any, make: Any) -> None:
    rig = rig_class()
    assert rig.scheduler.abort("a") is None
    rig.add(make("a", [1]))
    rig.abort("a")
    assert rig.scheduler.abort("a") is None
    rig.drain()
    assert rig.ends["a"].finish_reason == "abort"


def test_pooling_request_is_prefilled_and_returns_its_embedding(rig_class: Any, make: Any) -> None:
    rig = rig_class(max_num_batched_tokens=4)
    rig.run(make("a", [1] * 10, PoolingParams()))
    assert rig.ends["a"].embedding == [10.0]
    assert len(rig.plans) == 3


def test_prompt_logprobs_of_all_chunks_come_with_the_first_token(rig_class: Any, make: Any) -> None:
    rig = rig_class(max_num_batched_tokens=4)
    rig.run(make("a", [1] * 10, SamplingParams(max_tokens=2, prompt_logprobs=0), share_prefix=False))
    first, second = rig.updates
    assert first.prompt_logprobs[0] is None
    assert [entries[0].token_id for entries in first.prompt_logprobs[1:]] == list(range(1, 10))
    assert second.prompt_logprobs is None


def test_failed_row_ends_that_request_alone_and_its_blocks_are_not_shared(rig_class: Any, make: Any) -> None:
    rig = rig_class(max_num_seqs=1)
    bad, good = make("bad", [1] * 9), make("good", [2] * 9)
    rig.add(bad)
    rig.add(good)
    rig.device.broken.add(bad.seed)
    rig.drain()
    assert (rig.ends["bad"].finish_reason, rig.ends["bad"].error) == ("error", "logits are not finite")
    assert rig.ends["good"].finish_reason == "length"
    rig.run(make("again", [1] * 9), make("fine", [2] * 9))
    assert rig.ends["again"].num_cached_tokens == 0
    assert rig.ends["fine"].num_cached_tokens == 8


def test_fail_all_ends_everything(rig_class: Any, make: Any, picture: Any) -> None:
    rig = rig_class(max_num_seqs=1)
    for i in range(3):
        rig.add(make(f"{i}", [1, picture]))
    rig.ask()
    rig.step()
    for update in rig.scheduler.fail_all("the device is gone", "engine_dead"):
        rig._take(update)
    assert {update.error for update in rig.ends.values()} == {"the device is gone"}
    rig.drain()


# --------------------------------------------------------------------------------------------- budgets


def beside_an_answer(rig: Any, make: Any, *requests: Any) -> list[StepPlan]:
    """The plans of a run in which an answer goes on, from when the requests come in and their media are there."""
    rig.add(make("answer", [0, 1], SamplingParams(max_tokens=30)))
    rig.step()
    rig.commit()
    for request in requests:
        rig.add(request)
    rig.ask()
    while rig.needs:
        rig.answer_need()
    count = len(rig.plans)
    rig.drain()
    return [plan for plan in rig.plans[count:] if plan.rows]


def test_prompts_beside_an_answer_are_read_in_small_pieces_and_it_gains_a_token_each_step(
    rig_class: Any, make: Any
) -> None:
    rig = rig_class(max_num_tokens_beside_decodes=8)
    plans = beside_an_answer(rig, make, make("a", [2] * 20), make("b", [3] * 10))
    assert [rows(plan) for plan in plans[:4]] == [
        [(2, 1), (0, 8)],
        [(3, 1), (8, 8)],
        [(4, 1), (16, 4), (0, 4)],
        [(5, 1), (20, 1), (4, 6)],
    ]


def test_prompts_alone_fill_the_step(rig_class: Any, make: Any) -> None:
    rig = rig_class(max_num_tokens_beside_decodes=8)
    rig.run(make("a", [2] * 20), make("b", [3] * 10))
    assert rows(rig.plans[0]) == [(0, 20), (0, 10)]


@pytest.mark.parametrize(("max_patches", "num_encoded"), [(1, [1, 1, 1, 1]), (20, [2, 2, 0, 0]), (None, [4, 0, 0, 0])])
def test_pictures_beside_an_answer_are_encoded_a_few_at_a_time(
    rig_class: Any, make: Any, max_patches: int | None, num_encoded: list[int]
) -> None:
    rig = rig_class(max_num_patches_beside_decodes=max_patches)
    items = [rig_class.make_item(f"{i}", 2, 10, 30) for i in range(4)]
    plans = beside_an_answer(rig, make, *[make(f"r{i}", [item]) for i, item in enumerate(items)])
    assert [len(plan.encode) for plan in plans[:4]] == num_encoded


def test_ranges_larger_than_the_budget_beside_an_answer_run_one_a_step(rig_class: Any, make: Any, picture: Any) -> None:
    rig = rig_class(max_num_tokens_beside_decodes=2)
    requests = [make(name, [picture, *range(6)], bidirectional=True, share_prefix=False) for name in "ab"]
    plans = beside_an_answer(rig, make, *requests)
    assert rows(plans[0]) == [(2, 1), (0, 6)]  # the whole range, and nothing else that is not decoding
    assert rows(plans[1]) == [(3, 1), (6, 2)]


def test_chunked_prefill_leaves_a_token_for_every_decoding_request(rig_class: Any, make: Any) -> None:
    rig = rig_class(max_num_batched_tokens=8)
    rig.add(make("old", [0], LONG))
    rig.add(make("a", [1], LONG))
    rig.step()
    rig.commit()
    rig.add(make("long", [2] * 30, LONG))
    assert rows(rig.step()) == [(1, 1), (1, 1), (0, 4)]  # 6 left; a chunk ends with a block where it can
    rig.commit()
    assert rows(rig.step()) == [(2, 1), (2, 1), (4, 4)]
    rig.commit()
    rig.drain()


def test_prefill_leaves_a_token_for_decoding_requests_behind_it(rig_class: Any, make: Any, picture: Any) -> None:
    rig = rig_class(max_num_batched_tokens=4)
    for name, pieces in (("head", [0]), ("pictured", [picture, *[1] * 20]), ("young", [2])):
        rig.add(make(name, pieces, LONG))
    assert rows(rig.step()) == [(0, 1), (0, 1)]
    rig.commit()
    rig.ask()
    rig.answer_need()
    assert rows(rig.step()) == [(1, 1), (1, 1), (0, 2)]
    rig.commit()
    rig.step()
    rig.commit()
    assert rows(rig.step()) == [(3, 1), (3, 1), (4, 2)]
    rig.commit()
    rig.drain()


def test_range_as_large_as_a_step_runs_when_its_request_is_the_oldest(rig_class: Any, make: Any, picture: Any) -> None:
    rig = rig_class(max_num_batched_tokens=6)
    rig.add(make("ranged", [picture], bidirectional=True))
    rig.add(make("young", [0], LONG))
    rig.step()
    rig.commit()
    rig.ask()
    rig.answer_need()
    assert rows(rig.step()) == [(0, 6)]  # "young" waits for once
    rig.commit()
    rig.drain()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_waiting_requests_start_in_the_lines_order(rig_class: Any, make: Any, policy: str) -> None:
    rig = rig_class(max_num_seqs=1, policy=policy)
    rig.run(*(make(f"{i}", [i], priority=priority) for i, priority in enumerate([1, 0, 1, 0])))
    assert rig.finished == (["0", "1", "2", "3"] if policy == "fcfs" else ["1", "3", "0", "2"])


def test_plan_nothing_to_do_is_none(rig_class: Any, make: Any, picture: Any) -> None:
    rig = rig_class(pipeline_depth=1)
    assert rig.step() is None
    rig.add(make("a", [picture]))
    assert rig.step() is None  # waits for its picture
    rig.ask()
    rig.answer_need()
    assert rig.step() is not None
    assert rig.step() is None  # all in flight
    rig.drain()


# ---------------------------------------------------------------------------------------------- prefix


def test_second_request_shares_full_blocks_but_computes_its_last_token(rig_class: Any, make: Any) -> None:
    rig = rig_class()
    rig.run(make("a", [1] * 8))
    rig.run(make("b", [1] * 8), make("c", [1] * 9), make("d", [1] * 7 + [2]))
    assert [rig.ends[name].num_cached_tokens for name in "abcd"] == [0, 4, 8, 4]


def test_equal_prompts_added_together_are_computed_once(rig_class: Any, make: Any) -> None:
    rig = rig_class(max_num_batched_tokens=8)
    rig.run(*(make(f"{i}", [1] * 25, SamplingParams(max_tokens=1)) for i in range(3)))
    assert rig.device.num_rows_computed == 25 + 1 + 1


def test_answer_of_one_turn_is_cached_for_the_next(rig_class: Any, make: Any) -> None:
    rig = rig_class()
    rig.run(make("a", [1] * 6, SamplingParams(max_tokens=7)))
    rig.run(make("b", [1] * 6 + rig.tokens["a"] + [5] * 4))
    assert rig.ends["b"].num_cached_tokens == 12


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"cache_salt": "x"}, {"cache_salt": "x"}, 8),
        ({"cache_salt": "x"}, {"cache_salt": "y"}, 0),
        ({"share_prefix": False}, {}, 0),
        ({}, {"share_prefix": False}, 0),
    ],
    ids=["same-salt", "other-salt", "not-written", "not-read"],
)
def test_prefix_sharing_respects_salt_and_share_prefix(
    rig_class: Any, make: Any, first: dict[str, Any], second: dict[str, Any], expected: int
) -> None:
    rig = rig_class()
    rig.run(make("a", [1] * 9, **first))
    rig.run(make("b", [1] * 9, **second))
    assert rig.ends["b"].num_cached_tokens == expected


@pytest.mark.parametrize(("namespace", "expected"), [("n", 8), ("", 0)], ids=["samples", "strangers"])
def test_without_prefix_caching_only_samples_of_one_prompt_share(
    rig_class: Any, make: Any, namespace: str, expected: int
) -> None:
    rig = rig_class(enable_prefix_caching=False)
    rig.run(*(make(f"{i}", [1] * 9, cache_namespace=namespace) for i in range(3)))
    rig.run(make("later", [1] * 9, cache_namespace="other"))
    assert [rig.ends[f"{i}"].num_cached_tokens for i in range(3)] == [0, expected, expected]
    assert rig.ends["later"].num_cached_tokens == 0


def test_hit_never_ends_inside_a_range(rig_class: Any, make: Any) -> None:
    rig = rig_class()
    wide = rig_class.make_item("wide", 10, 1, 1)
    rig.run(make("a", [1, 1, wide, 2, 2, 2], bidirectional=True))
    rig.run(make("b", [1, 1, wide, 3, 3], bidirectional=True), make("c", [1, 1, wide], bidirectional=True))
    assert rig.ends["b"].num_cached_tokens == 12
    assert rig.ends["c"].num_cached_tokens == 0  # its last token is in the range, so the range is computed


def test_leases_of_waiting_requests_go_before_anybody_is_preempted(rig_class: Any, make: Any) -> None:
    rig = rig_class(num_blocks=7, max_num_seqs=1, max_model_len=24)
    rig.run(make("seed", [1] * 9, SamplingParams(max_tokens=1)))
    rig.add(make("runs", [2] * 9, SamplingParams(max_tokens=15)))
    rig.add(make("waits", [1] * 9, SamplingParams(max_tokens=1)))
    assert dict(rig.scheduler.stats())["kv_blocks_used"] == 2  # the hits of "waits"
    rig.drain()
    assert dict(rig.scheduler.stats())["num_preemptions_total"] == 0
    assert rig.ends["waits"].num_cached_tokens < 8  # its lease was needed


# ------------------------------------------------------------------------------------------ preemption


def test_oldest_takes_the_slot_of_the_last_when_its_picture_comes(rig_class: Any, make: Any, picture: Any) -> None:
    rig = rig_class(max_num_seqs=2)
    rig.add(make("pictured", [picture], SamplingParams(max_tokens=1)))
    rig.add(make("text", [1], LONG))
    rig.add(make("more", [2], LONG))
    assert rows(rig.step()) == [(0, 1), (0, 1)]  # text does not wait behind the picture
    rig.commit()
    rig.ask()
    rig.answer_need()
    assert rows(rig.step()) == [(1, 1), (0, 6)]
    rig.commit()
    assert rig.finished == ["pictured"]
    rig.drain()


# ----------------------------------------------------------------------------------------------- media


def test_picture_of_several_requests_is_asked_and_encoded_once(rig_class: Any, make: Any, picture: Any) -> None:
    rig = rig_class()
    for i in range(3):
        rig.add(make(f"{i}", [i, picture, picture]))
    rig.ask()
    assert len(rig.needs) == 1
    rig.drain()
    assert rig.device.num_encoded == 1


def test_picture_in_a_cached_prefix_or_in_the_feature_cache_is_not_asked_for(
    rig_class: Any, make: Any, picture: Any
) -> None:
    rig = rig_class()
    rig.run(make("a", [1, picture, 2]))
    rig.add(make("prefix", [1, picture, 2]))
    rig.add(make("feature", [3, picture]))
    rig.ask()
    assert rig.needs == []
    rig.drain()
    assert rig.device.num_encoded == 1


def test_picture_that_fails_ends_every_request_that_shows_it_and_no_other(
    rig_class: Any, make: Any, picture: Any
) -> None:
    rig = rig_class()
    for name, pieces in (("a", [picture]), ("b", [1, picture]), ("c", [1])):
        rig.add(make(name, pieces))
    rig.ask()
    rig.answer_need(fail=True)
    assert {name: end.error_code for name, end in rig.ends.items()} == {"a": "bad_image", "b": "bad_image"}
    rig.drain()
    assert rig.ends["c"].finish_reason == "length"


def test_chunk_stops_before_a_picture_that_is_not_there_yet(rig_class: Any, make: Any) -> None:
    rig = rig_class()
    one, two = (rig_class.make_item(name, 6, 10, 30) for name in ("one", "two"))
    rig.add(make("a", [one, 1, 1, two, 1]))
    rig.ask()
    rig.answer_need(0)
    assert rows(rig.step()) == [(0, 8)]
    rig.commit()
    assert rig.step() is None
    rig.answer_need(0)
    assert rows(rig.step()) == [(8, 7)]
    rig.commit()
    rig.drain()


def test_payload_of_an_aborted_request_is_dropped(rig_class: Any, make: Any, picture: Any) -> None:
    rig = rig_class()
    rig.add(make("a", [picture]))
    rig.ask()
    rig.answer_need()
    rig.abort("a")
    plan = rig.step()
    assert plan is not None
    assert (plan.rows, plan.drop_payloads) == ((), (b"picture",))
    rig.commit()
    rig.drain()


def test_preempted_request_asks_again_for_features_that_are_gone(rig_class: Any, make: Any) -> None:
    rig = rig_class(num_blocks=9, max_model_len=24, feature_bytes=60, enable_prefix_caching=False)
    pictures = [rig_class.make_item(f"{i}", 6, 10, 30) for i in range(3)]
    rig.run(*(make(f"{i}", [picture], SamplingParams(max_tokens=18)) for i, picture in enumerate(pictures)))
    assert dict(rig.scheduler.stats())["num_preemptions_total"] > 0
    assert rig.device.num_encoded > 3


def test_new_hits_of_the_oldest_free_the_features_that_keep_its_next_picture_out(rig_class: Any, make: Any) -> None:
    rig = rig_class(block_size=2, feature_bytes=120, max_num_seqs=1)
    one, two = rig_class.make_item("one", 5, 1, 1), rig_class.make_item("two", 8, 1, 1)
    rig.run(
        make("a", [1, 1, 1, one], SamplingParams(max_tokens=1)),
        make("b", [1, 1, 1, one, two], SamplingParams(max_tokens=1)),
    )
    assert rig.ends["b"].num_cached_tokens == 8
