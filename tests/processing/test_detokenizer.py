import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.processing.detokenizer import Detokenizer, StopStrings
from tests.processing import vocabularies

TEXTS = st.text(
    alphabet=st.one_of(st.sampled_from("the fox, 2 \n é你😀�"), st.characters(exclude_categories=["Cs"])), max_size=40
)


def stream(kind: str, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(vocabularies.tokenizer(kind), skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", vocabularies.KINDS)
@settings(deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), skip=st.booleans())
def test_stream_of_any_text_adds_up_to_the_whole_decode(kind: str, texts: list[str], skip: bool) -> None:
    tokenizer = vocabularies.tokenizer(kind)
    ids = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False), 2]]

    pieces = stream(kind, ids, skip)

    assert "".join(pieces) == vocabularies.huggingface(kind).decode(ids, skip_special_tokens=skip)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 450), max_size=60), skip=st.booleans())
def test_stream_of_any_byte_level_ids_adds_up_to_the_whole_decode(ids: list[int], skip: bool) -> None:
    # Random ids are mostly broken UTF-8, and some are past the vocabulary.
    whole = vocabularies.tokenizer("byte-level").decode(ids, skip_special_tokens=skip)
    assert "".join(stream("byte-level", ids, skip)) == whole


@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["▁the", "▁", "fox", "e", "<s>", "</s>", "<0xE4>", "<0x0A>", "<0x41>"])))
def test_stream_of_broken_byte_fallback_ends_as_its_tokens_do(words: list[str]) -> None:
    tokenizer = vocabularies.tokenizer("sentencepiece-always")
    ids = [tokenizer.convert_tokens_to_ids(word) or 0 for word in words]
    broken = {"<0xE4>"} & set(words)

    text = "".join(stream("sentencepiece-always", ids))

    whole = tokenizer.decode(ids)
    assert text == whole or (broken and len(text) == len(whole))


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_half_a_character_waits_for_its_other_half(kind: str) -> None:
    tokenizer = vocabularies.tokenizer(kind)
    ids = tokenizer.encode("a 😀 b", add_special_tokens=False)

    pieces = stream(kind, ids)

    assert len(ids) > 5  # the emoji takes several tokens
    assert "".join(pieces) == "a 😀 b"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "😀" in pieces[-3:][0] + pieces[-2]  # and came as soon as it was whole, not at the end


def test_text_that_ends_in_half_a_character_is_flushed_as_it_is() -> None:
    ids = vocabularies.tokenizer("byte-level").encode("ok 😀", add_special_tokens=False)[:-1]
    pieces = stream("byte-level", ids)
    assert "".join(pieces) == "ok \ufffd"
    assert pieces[-1] == "\ufffd"


def test_endless_broken_bytes_cost_linear_time() -> None:
    tokenizer = vocabularies.tokenizer("byte-level")
    token = tokenizer.encode("é", add_special_tokens=False)[0]  # the first byte of two

    def seconds(count: int) -> float:
        detokenizer = Detokenizer(tokenizer)
        start = time.thread_time()
        for _ in range(count):
            detokenizer.add(token)
        return time.thread_time() - start

    short, long = min(seconds(500) for _ in range(3)), seconds(4000)
    assert long < 40 * short  # 8 times the tokens; quadratic would be 64 times


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_stop_strings_cut_anywhere_are_found_where_the_first_one_is_complete(
    stops: list[str], pieces: list[str]
) -> None:
    text = "".join(pieces)
    ends = sorted((text.find(s) + len(s), -len(s), s) for s in stops if s in text)
    finder = StopStrings(stops)

    match = next((m for m in map(finder.add, pieces) if m is not None), None)

    if not ends:
        assert match is None
        longest = max(
            (k for k in range(len(text) + 1) for s in stops if k < len(s) and text.endswith(s[:k])), default=0
        )
        assert finder.pending == longest
    else:
        assert match is not None
        end, _, stop = ends[0]
        assert (match.end, match.stop, match.start) == (end, stop, end - len(stop))
