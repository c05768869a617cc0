"""The vision-feature cache: budgets, states, who goes first and who has to go."""

from __future__ import annotations

import pytest

from opsin.cache import features
from opsin.cache.features import FeatureCache, Lease
from opsin.types import MediaItem, MediaLayout, PixelPlan, Resize, View

A, B, C = (0, 1), (0, 2), (0, 3)  # places in the line


def item(name: str, rows: int = 4, patches: int = 10, pixels: int = 10) -> MediaItem:
    plan = PixelPlan(width=1, height=1, views=(View(ops=(), height=1, width=pixels),))
    layout = MediaLayout(plan=plan, num_features=rows, num_patches=patches)
    return MediaItem(key=name.encode(), modality="image", layout=layout)


def make(rows: int = 8, pixels: int = 100) -> FeatureCache:
    return FeatureCache(rows * 2, 2, pixels * 3)  # 2 bytes per row, 3 per pixel


def lease(cache: FeatureCache, what: MediaItem, order: tuple[int, int], position: int = 0) -> None:
    cache.lease(what, order, Lease(position, f"r{order[1]}", 0))


def asked(cache: FeatureCache, urgent: bytes | None = None) -> list[tuple[bytes, str]]:
    return [(need.key, need.request_id) for need in cache.take_needs(urgent)]


def encoded(cache: FeatureCache, patches: int = 1000, urgent: bytes | None = None) -> list[bytes]:
    return [chosen.key for chosen in cache.encode(patches, urgent)]


def supply(cache: FeatureCache) -> None:
    for key, _ in asked(cache):
        cache.payload_ready(key)


def store(cache: FeatureCache, what: MediaItem, order: tuple[int, int], position: int = 0) -> None:
    lease(cache, what, order, position)
    supply(cache)
    assert encoded(cache) == [what.key]


def test_item_of_two_requests_is_asked_and_encoded_once() -> None:
    cache = make()
    lease(cache, item("a"), B)
    lease(cache, item("a"), A)
    assert asked(cache) == [(b"a", "r1")]
    assert asked(cache) == []
    cache.payload_ready(b"a")
    assert encoded(cache) == [b"a"]
    assert encoded(cache) == []
    assert cache.feature_id(b"a") is not None


def test_needs_come_in_the_lines_order_then_by_position() -> None:
    cache = make()
    lease(cache, item("late"), B, 0)
    lease(cache, item("second"), A, 9)
    lease(cache, item("first"), A, 3)
    assert [key for key, _ in asked(cache)] == [b"first", b"second", b"late"]


def test_needs_stop_at_the_payload_budget_and_a_larger_item_goes_alone() -> None:
    cache = make(pixels=20)
    for name, order in (("a", A), ("b", B), ("c", C)):
        lease(cache, item(name), order)
    lease(cache, item("huge", pixels=50), (0, 4))
    assert [key for key, _ in asked(cache)] == [b"a", b"b"]
    cache.payload_ready(b"a")
    assert asked(cache) == []  # held until encoded
    encoded(cache)
    assert [key for key, _ in asked(cache)] == [b"c"]
    cache.payload_ready(b"b")
    cache.payload_ready(b"c")
    encoded(cache)
    assert asked(cache) == []  # c waits for room among the features
    cache.release(b"a", A)
    encoded(cache)
    assert [key for key, _ in asked(cache)] == [b"huge"]


def test_embedding_counts_its_features_as_payload() -> None:
    cache = make()
    layout = MediaLayout(plan=PixelPlan(width=1, height=1, views=()), num_features=4, num_patches=0)
    lease(cache, MediaItem(key=b"e", modality="image", layout=layout), A)
    asked(cache)
    assert cache.payload_bytes == 8


def test_encode_keeps_the_patch_budget_and_a_larger_item_goes_alone() -> None:
    cache = make(rows=100)
    for i, patches in enumerate((10, 10, 10, 50, 1)):
        lease(cache, item(f"{i}", patches=patches), (0, i))
    supply(cache)
    assert encoded(cache, 20) == [b"0", b"1"]
    assert encoded(cache, 20) == [b"2"]
    assert encoded(cache, 20) == [b"3"]
    assert encoded(cache, 20) == [b"4"]


def test_encode_moves_so_many_bytes_in_one_step_and_a_larger_payload_goes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "MAX_STEP_BYTES", 60)
    cache = make(rows=40)
    for order, (name, pixels) in enumerate((("a", 10), ("b", 10), ("c", 30), ("d", 1))):
        lease(cache, item(name, pixels=pixels), (0, order))
    supply(cache)
    assert [encoded(cache) for _ in range(4)] == [[b"a", b"b"], [b"c"], [b"d"], []]


def test_encode_ahead_never_evicts_what_others_still_read() -> None:
    cache = make(rows=8)
    store(cache, item("b"), B)
    store(cache, item("c"), C)
    lease(cache, item("a"), A)
    supply(cache)
    assert encoded(cache) == []
    assert cache.take_drops() == ((), ())


def test_encode_evicts_unleased_features_least_recently_used_first() -> None:
    cache = make(rows=8)
    store(cache, item("old"), A)
    store(cache, item("new"), A, 5)
    cache.release(b"new", A)
    cache.release(b"old", A)  # used last
    dropped = cache.feature_id(b"new")
    store(cache, item("next"), B)
    assert cache.take_drops() == ((dropped,), ())
    assert cache.feature_id(b"old") is not None
    assert cache.feature_id(b"next") == dropped  # drops come before encodes, so the id may return at once


def test_encode_urgent_item_takes_room_from_the_last_in_line() -> None:
    cache = make(rows=8)
    store(cache, item("b"), B)
    store(cache, item("c"), C)
    lost = cache.feature_id(b"c")
    lease(cache, item("a"), A)
    supply(cache)
    assert encoded(cache, urgent=b"a") == [b"a"]
    assert cache.take_drops() == ((lost,), ())
    assert asked(cache) == [(b"c", "r3")]  # still wanted


def test_encode_urgent_item_never_evicts_the_same_requests_earlier_item() -> None:
    cache = make(rows=8)
    store(cache, item("first"), A, 0)
    store(cache, item("later"), A, 20)
    lease(cache, item("next"), A, 10)
    supply(cache)
    assert encoded(cache, urgent=b"next") == [b"next"]
    assert cache.feature_id(b"first") is not None
    assert cache.feature_id(b"later") is None


def test_needs_urgent_item_takes_payload_budget_from_the_last_in_line() -> None:
    cache = make(rows=4, pixels=20)
    lease(cache, item("b"), B)
    lease(cache, item("c"), C)
    supply(cache)
    lease(cache, item("a"), A)
    assert asked(cache) == []
    assert asked(cache, urgent=b"a") == [(b"a", "r1")]
    assert cache.take_drops() == ((), (b"c",))
    assert cache.wants(b"a")
    assert not cache.wants(b"c")


def test_payload_sent_again_before_its_drop_was_planned_is_not_dropped() -> None:
    cache = make()
    lease(cache, item("a"), A)
    supply(cache)
    cache.release(b"a", A, ended=True)
    assert cache.has_drops
    lease(cache, item("a"), B)
    supply(cache)
    assert cache.take_drops() == ((), ())


def test_release_by_the_asked_request_asks_another_and_takes_either_answer() -> None:
    cache = make()
    lease(cache, item("a"), A)
    lease(cache, item("a"), B)
    assert asked(cache) == [(b"a", "r1")]
    cache.release(b"a", A, ended=True)
    assert asked(cache) == [(b"a", "r2")]
    cache.payload_ready(b"a")
    assert not cache.wants(b"a")
    assert encoded(cache) == [b"a"]


def test_release_while_asked_gives_the_budget_back_and_ignores_the_answer() -> None:
    cache = make()
    lease(cache, item("a"), A)
    asked(cache)
    cache.release(b"a", A, ended=True)
    assert cache.payload_bytes == 0
    assert not cache.wants(b"a")
    assert cache.payload_failed(b"a") == []
    with pytest.raises(AssertionError, match="nobody waits"):
        cache.payload_ready(b"a")


def test_payload_failed_names_all_who_wanted_it_and_can_be_asked_again() -> None:
    cache = make()
    lease(cache, item("a"), B)
    lease(cache, item("a"), A)
    asked(cache)
    assert cache.payload_failed(b"a") == [A, B]
    for order in (A, B):
        cache.release(b"a", order, ended=True)
    assert cache.payload_bytes == 0
    lease(cache, item("a"), C)
    assert asked(cache) == [(b"a", "r3")]


def test_lease_stored_item_needs_nothing_and_keeps_it() -> None:
    cache = make(rows=4)
    store(cache, item("a"), A)
    cache.release(b"a", A)
    assert cache.leased_bytes == 0
    lease(cache, item("a"), B)
    assert asked(cache) == []
    assert cache.leased_bytes == 8
    lease(cache, item("c"), C)
    supply(cache)
    assert encoded(cache) == []


def test_payloads_that_come_encoded_weigh_what_their_features_do() -> None:
    cache = FeatureCache(1000, 10, 100, as_features=True)
    lease(cache, item("wide", rows=8, pixels=10), A)  # 30 bytes of pixels, 80 of features
    lease(cache, item("late", rows=4, pixels=10), B)
    assert asked(cache) == [(b"wide", "r1")]
    assert cache.payload_bytes == 80
    cache.payload_ready(b"wide")
    assert encoded(cache) == [b"wide"]
    assert asked(cache) == [(b"late", "r2")]


def test_payloads_that_come_as_they_are_weigh_what_the_picture_does() -> None:
    cache = FeatureCache(1000, 2, 1300, max_raw_pixels=400)
    for name, width in (("raw", 20), ("large", 21)):  # of 20 rows
        plan = PixelPlan(width=width, height=20, views=(View(ops=(Resize(5, 2),), height=2, width=5),))
        layout = MediaLayout(plan=plan, num_features=4, num_patches=1)
        lease(cache, MediaItem(key=name.encode(), modality="image", layout=layout), A if name == "raw" else B)
        asked(cache)
    assert cache.payload_bytes == 3 * 400 + 3 * 10
