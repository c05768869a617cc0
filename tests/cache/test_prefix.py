"""Which prefixes have the same name."""

from __future__ import annotations

from array import array

import pytest

from opsin.cache.prefix import BlockHasher
from opsin.params import SamplingParams
from opsin.types import EngineRequest, FeatureSpan, MediaItem, MediaLayout, PixelPlan

SIZE = 4
TOKENS = list(range(12))


def item(key: bytes) -> MediaItem:
    plan = PixelPlan(width=1, height=1, views=())
    return MediaItem(key=key, modality="image", layout=MediaLayout(plan=plan, num_features=6, num_patches=6))


def names(
    tokens: list[int] = TOKENS,
    *,
    root: tuple[str, ...] = ("", ""),
    num_prompt: int | None = None,
    key: bytes | None = None,
    start: int = 3,
    feature_start: int = 0,
    ranges: list[tuple[int, int]] | None = None,
    positions: list[list[int]] | None = None,
    delta: int = 0,
) -> list[bytes]:
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=tokens[:num_prompt],
        params=SamplingParams(),
        media=[item(key)] if key else [],
        spans=[FeatureSpan(0, start, 6, feature_start)] if key else [],
        bidirectional=ranges or [],
        positions=b"".join(array("i", axis).tobytes() for axis in positions) if positions else None,
        position_delta=delta,
    )
    hasher = BlockHasher(request, tokens, SIZE, root)
    return [hasher.digest(block) for block in range(len(tokens) // SIZE)]


def num_shared(left: list[bytes], right: list[bytes]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))


def test_digest_same_input_same_names_all_different() -> None:
    assert names() == names()
    assert len(set(names([7] * 12))) == 3  # equal blocks at different places differ


@pytest.mark.parametrize("changed", range(12), ids=lambda i: f"token{i}")
def test_digest_changed_token_changes_its_block_and_all_after(changed: int) -> None:
    tokens = list(TOKENS)
    tokens[changed] += 100
    assert num_shared(names(), names(tokens)) == changed // SIZE


@pytest.mark.parametrize("root", [("", "salt"), ("a", ""), ("", "a")], ids=["salt", "scope", "other"])
def test_digest_other_root_shares_nothing(root: tuple[str, ...]) -> None:
    assert num_shared(names(), names(root=root)) == 0
    assert num_shared(names(root=("a", "")), names(root=("", "a"))) == 0


def test_digest_other_picture_at_the_same_placeholders_differs_from_its_first_block() -> None:
    assert num_shared(names(key=b"cat", start=4), names(key=b"dog", start=4)) == 1
    assert num_shared(names(key=b"cat", start=3), names(key=b"dog", start=3)) == 0


def test_digest_shifted_picture_or_feature_rows_differ() -> None:
    assert num_shared(names(key=b"cat", start=4), names(key=b"cat", start=5)) == 1
    assert num_shared(names(key=b"cat", start=4), names(key=b"cat", start=4, feature_start=1)) == 1


def test_digest_range_end_beyond_the_block_changes_it() -> None:
    assert num_shared(names(ranges=[(5, 9)]), names(ranges=[(5, 10)])) == 1
    assert num_shared(names(), names(ranges=[(5, 7)])) == 1


def test_digest_plain_positions_equal_no_positions() -> None:
    plain = list(range(12))
    assert names(positions=[plain, plain, plain]) == names()


def test_digest_positions_of_one_axis_change_the_block() -> None:
    plain = list(range(12))
    other = [*plain[:6], *[5] * 6]
    assert num_shared(names(positions=[plain, plain, plain]), names(positions=[plain, plain, other])) == 1


def test_digest_generated_tokens_as_prompt_of_the_next_turn_have_the_same_name() -> None:
    positions = [0, 1, 2, 2, 2, 3, 4, 5]
    continued = [*positions, 6, 7, 8, 9]
    first = names(num_prompt=8, positions=[positions, positions], delta=-2)
    assert first == names(positions=[continued, continued], delta=-2)
    assert num_shared(first, names(num_prompt=8, positions=[positions, positions], delta=-1)) == 2


def test_digest_unknown_token_asserts() -> None:
    request = EngineRequest(request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams())
    with pytest.raises(AssertionError, match="known"):
        BlockHasher(request, [1, 2, 3], SIZE, ("",)).digest(0)
