"""The block pool against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from opsin.cache.blocks import BlockPool


def test_allocate_all_blocks_never_hands_out_scratch() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_allocate_more_than_free_asserts() -> None:
    with pytest.raises(AssertionError, match="5 blocks wanted, 4 free"):
        BlockPool(5).allocate(5)


def test_release_twice_asserts() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)


def test_evict_table_released_loses_its_tail_first_and_oldest_table_first() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(2), pool.allocate(2)
    for name, block in zip([b"a0", b"a1", b"b0", b"b1"], first + second, strict=True):
        pool.register(block, name)
    pool.release(first)
    pool.release(second)
    gone: list[bytes] = []
    for _ in range(4):
        pool.allocate(1)
        gone += [name for name in (b"a0", b"a1", b"b0", b"b1") if pool.find(name) is None and name not in gone]
    assert gone == [b"a1", b"a0", b"b1", b"b0"]


def test_share_idle_block_is_not_evicted() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.register(block, b"x")
    pool.release([block])
    pool.share(block)
    assert pool.num_free == 1
    assert pool.allocate(1) != [block]


def test_register_twin_keeps_the_first_block() -> None:
    pool = BlockPool(3)
    one, two = pool.allocate(2)
    pool.register(one, b"x")
    pool.register(two, b"x")
    assert pool.find(b"x") == one
    pool.release([two])
    assert pool.find(b"x") == one


def test_forget_idle_block_is_blank_again() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.register(block, b"x")
    pool.release([block])
    pool.forget(b"x")
    pool.forget(b"never known")
    assert pool.find(b"x") is None
    assert pool.num_free == 2
    assert len(set(pool.allocate(2))) == 2


class PoolMachine(RuleBasedStateMachine):
    """Tables of held blocks beside the pool; every handed-out block must be unheld, every hit must be the right one."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.num_names = 0

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            return
        blocks = self.pool.allocate(count)
        held = {block for table in self.tables for block in table}
        assert not held & set(blocks)
        for block in blocks:
            self.content.pop(block, None)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), twin=st.booleans())
    def register(self, data: st.DataObject, twin: bool) -> None:
        table = data.draw(st.sampled_from(self.tables))
        blank = [block for block in table if block not in self.content]
        if not blank:
            return
        if twin and self.content:
            self.pool.register(blank[0], next(iter(self.content.values())))
            return
        self.num_names += 1
        self.content[blank[0]] = f"{self.num_names}".encode()
        self.pool.register(blank[0], self.content[blank[0]])

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.content)))
        self.pool.share(block)
        self.tables.append([block])

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.content)))
        self.pool.forget(self.content.pop(block))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def agrees(self) -> None:
        held = {block for table in self.tables for block in table}
        assert self.pool.num_free == self.pool.num_usable - len(held)
        for block, name in self.content.items():
            assert self.pool.find(name) == block


def test_pool_random_use_agrees_with_a_model() -> None:
    profile = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None)
    run_state_machine_as_test(PoolMachine, settings=profile)
