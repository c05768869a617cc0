"""A request's block table: what it shares with others, and what others find of it."""

from __future__ import annotations

import pytest

from opsin.cache.blocks import BlockPool
from opsin.cache.prefix import BlockHasher
from opsin.cache.table import BlockTable
from opsin.params import SamplingParams
from opsin.types import EngineRequest

SIZE = 4
TOKENS = list(range(12))


def anywhere(position: int) -> int:
    return position


def table(pool: BlockPool, tokens: list[int] = TOKENS) -> BlockTable:
    request = EngineRequest(request_id="r", prompt_token_ids=tokens, params=SamplingParams())
    return BlockTable(pool, SIZE, BlockHasher(request, tokens, SIZE, ("",)))


def published(pool: BlockPool, num_positions: int = len(TOKENS)) -> BlockTable:
    first = table(pool)
    first.grow(first.num_missing(len(TOKENS)))
    first.publish(num_positions)
    return first


@pytest.mark.parametrize(("num_published", "num_shared"), [(12, 12), (11, 8), (3, 0)])
def test_share_published_prefix_takes_its_full_blocks(num_published: int, num_shared: int) -> None:
    pool = BlockPool(6)
    first, second = published(pool, num_published), table(pool)
    assert second.share(0, len(TOKENS), anywhere) == num_shared
    assert len(second) == num_shared // SIZE
    assert second.take_unsent() == first.take_unsent()[: len(second)]
    assert second.take_unsent() == ()


def test_share_limit_inside_a_block_ends_before_it() -> None:
    pool = BlockPool(6)
    published(pool)
    assert table(pool).share(0, 11, anywhere) == 8


def test_share_cut_inside_a_range_ends_before_it() -> None:
    pool = BlockPool(6)
    published(pool)
    assert table(pool).share(0, 12, lambda position: min(position, 6)) == 4


def test_share_from_inside_a_block_finds_nothing() -> None:
    pool = BlockPool(6)
    published(pool)
    second = table(pool)
    second.grow(1)
    assert second.share(3, 12, anywhere) == 3
    assert second.share(4, 12, anywhere) == 12


def test_share_other_tokens_finds_nothing() -> None:
    pool = BlockPool(6)
    published(pool)
    assert table(pool, [7, *TOKENS]).share(0, 12, anywhere) == 0


def test_share_without_a_hasher_finds_nothing_and_publishes_nothing() -> None:
    pool = BlockPool(6)
    private = BlockTable(pool, SIZE, None)
    private.grow(3)
    private.publish(12)
    assert table(pool).share(0, 12, anywhere) == 0
    assert BlockTable(pool, SIZE, None).share(0, 12, anywhere) == 0


def test_name_does_the_work_ahead_and_publishes_nothing() -> None:
    pool = BlockPool(8)
    tokens = list(TOKENS)
    first = table(pool, tokens)
    first.grow(first.num_missing(len(tokens)))
    first.name(len(tokens))
    tokens.clear()  # what is named by now needs them no more
    second = table(pool)
    assert second.share(0, len(TOKENS), anywhere) == 0
    first.publish(len(TOKENS))
    assert second.share(0, len(TOKENS), anywhere) == len(TOKENS)


def test_forget_shared_prefix_hides_it_from_others() -> None:
    pool = BlockPool(6)
    published(pool).forget()
    assert table(pool).share(0, 12, anywhere) == 0


def test_release_published_prefix_stays_to_be_found() -> None:
    pool = BlockPool(4)
    first = published(pool)
    first.release()
    assert len(first) == 0
    assert pool.num_free == 3
    assert table(pool).share(0, 12, anywhere) == 12
    assert pool.num_free == 0
