"""Expansion for families unlike LLaVA: numbered placeholders that are not tokens, text between features, two media."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from opsin.errors import RequestError
from opsin.models.rule import Placeholder, Positions, TokenRun
from opsin.processing import expand
from opsin.processing.neutral import Rendered
from opsin.types import Clip, FeatureSpan, MediaItem, MediaLayout, Modality, PixelPlan
from tests.processing import vocabularies

ROW, END, FEATURE, CLIP = 300, 301, 302, 303
TOKENIZER = vocabularies.tokenizer("byte-level")


class RowsRule:
    """Two features, a row token, two features, an end token; frames of a clip are one feature each."""

    def placeholder(self, modality: Modality) -> Placeholder:
        if modality == "video":
            return Placeholder("</s>", 2, re.escape("</s>"))  # a token of the vocabulary
        return Placeholder("<|image_{index}|>", None, r"<\|image_\d+\|>")

    def max_items(self, modality: Modality) -> int | None:
        return None

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        return MediaLayout(PixelPlan(width, height, ()), 4, 4)

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        return MediaLayout(PixelPlan(clip.width, clip.height, ()), 2, 2)

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        return MediaLayout(PixelPlan(0, 0, ()), num_features, 0)

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        if modality == "video":
            return [TokenRun(CLIP, 1, True), TokenRun(CLIP, 1, True)]
        return [TokenRun(FEATURE, 2, True), TokenRun(ROW), TokenRun(FEATURE, 2, True), TokenRun(END, index)]

    def complete(self, text: str, signs: Sequence[tuple[int, int]], num_items: int) -> Sequence[tuple[int, str]]:
        return ()

    def bidirectional(self, spans: Sequence[tuple[int, int]], prompt_len: int) -> list[tuple[int, int]]:
        return list(spans)

    def positions(self, token_ids: Sequence[int], items: Sequence[MediaItem]) -> Positions | None:
        return None


RULE = RowsRule()
PLACEHOLDERS: dict[Modality, Placeholder] = {"image": RULE.placeholder("image"), "video": RULE.placeholder("video")}


def item(modality: Modality) -> MediaItem:
    return MediaItem(b"k", modality, RULE.layout(modality, 1, 1, 1, {}))


def written(media: Sequence[MediaItem]) -> list[expand.Written]:
    return expand.write(media, RULE, TOKENIZER)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_placeholders_cut_from_text_and_from_ids_keep_their_order() -> None:
    text = "the <|image_1|></s>fox<|image_2|> "
    slotted = expand.tokenize(Rendered(text), PLACEHOLDERS, TOKENIZER, add_special_tokens=True)
    assert slotted.slots == ["image", "video", "image"]
    assert slotted.pieces == [[1, *ids("the ")], [], ids("fox"), ids(" ")]

    media = [item("image"), item("image"), item("video")]
    order = expand.order_by_slots(slotted.slots, media)
    assert order == [0, 2, 1]
    expanded = expand.expand(slotted, written([media[i] for i in order]))

    first = [FEATURE, FEATURE, ROW, FEATURE, FEATURE, END]
    head = [1, *ids("the ")]
    assert expanded.token_ids == [*head, *first, CLIP, CLIP, *ids("fox"), *first, END, *ids(" ")]
    at, clip, last = len(head), len(head) + 6, len(head) + 8 + len(ids("fox"))
    assert expanded.spans == [
        FeatureSpan(0, at, 2, 0),
        FeatureSpan(0, at + 3, 2, 2),
        FeatureSpan(1, clip, 2, 0),
        FeatureSpan(2, last, 2, 0),
        FeatureSpan(2, last + 3, 2, 2),
    ]
    assert expanded.ranges == [(at, at + 6), (clip, clip + 2), (last, last + 7)]
    for span in expanded.spans:
        assert set(expanded.token_ids[span.start : span.start + span.length]) <= {FEATURE, CLIP}
    assert expand.match_expanded(expanded.token_ids, written([media[i] for i in order])) == expanded


@pytest.mark.parametrize("special", [True, False])
def test_text_behind_an_item_begins_anew_where_the_placeholder_says_so(special: bool) -> None:
    """Whether or not a begin token is added to the prompt, which may have brought its own."""
    sign = PLACEHOLDERS["image"]._replace(begins_text=True)
    prompt = Rendered("the <|image_1|><|image_2|> fox")
    slotted = expand.tokenize(prompt, {"image": sign}, TOKENIZER, add_special_tokens=special)
    assert slotted.pieces == [[*([1] if special else []), *ids("the ")], [1], [1, *ids(" fox")]]


@pytest.mark.parametrize("numbers", [(2, 1), (1, 1), (0, 1), (2, 3), (1, 3)])
def test_placeholders_whose_numbers_do_not_count_the_items_are_refused(numbers: tuple[int, int]) -> None:
    sign = PLACEHOLDERS["image"]._replace(pattern=r"<\|image_(\d+)\|>")
    prompt = Rendered("".join(f"<|image_{number}|>" for number in numbers))
    with pytest.raises(RequestError, match="number their placeholders from 1"):
        expand.tokenize(prompt, {"image": sign}, TOKENIZER, add_special_tokens=False)


def test_number_of_a_placeholder_that_a_user_wrote_does_not_count() -> None:
    sign = PLACEHOLDERS["image"]._replace(pattern=r"<\|image_(\d+)\|>")
    text = "<|image_7|> and <|image_1|>"
    prompt = Rendered(text, [(0, len("<|image_7|>"))])
    assert expand.tokenize(prompt, {"image": sign}, TOKENIZER, add_special_tokens=False).slots == ["image"]


def test_placeholder_that_a_user_wrote_is_no_slot() -> None:
    text = "the <|image_1|> and <|image_1|> fox"
    at = text.rindex("<|image_1|>")
    prompt = Rendered(text, [(at, at + len("<|image_1|>"))])
    slotted = expand.tokenize(prompt, PLACEHOLDERS, TOKENIZER, add_special_tokens=False)
    assert slotted.slots == ["image"]
    assert TOKENIZER.decode(slotted.pieces[1]) == " and <|image_1|> fox"


@pytest.mark.parametrize("change", ["drop", "alter", "repeat"])
def test_expanded_ids_that_do_not_fit_are_not_matched(change: str) -> None:
    good = [9, FEATURE, FEATURE, ROW, FEATURE, FEATURE, END, 9]
    bad = {"drop": good[:4] + good[5:], "alter": [*good[:3], 9, *good[4:]], "repeat": [*good, FEATURE]}[change]
    assert expand.match_expanded(good, written([item("image")])) is not None
    assert expand.match_expanded(bad, written([item("image")])) is None


def test_counts_are_checked_per_modality() -> None:
    with pytest.raises(RequestError, match=r"has 1 video placeholder\(s\) but 0 video\(s\)"):
        expand.check_counts(["image", "video"], [item("image")], PLACEHOLDERS)


def test_ten_thousand_placeholders_expand_at_once() -> None:
    prompt = [2] * 10_000
    media = [item("video")] * len(prompt)
    slotted = expand.cut(prompt, PLACEHOLDERS)
    expanded = expand.expand(slotted, written(media))
    assert len(expanded.token_ids) == 20_000
    assert expand.match_expanded(expanded.token_ids, written(media)) == expanded


class CaptionedRule(RowsRule):
    """Clips with words around every frame."""

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        if modality == "image":
            return super().expand(modality, index, layout)
        frame = TokenRun(CLIP, 1, True)
        return [f"fox {index}: ", TokenRun(ROW), frame, TokenRun(END), "\nfox:", TokenRun(ROW), frame, " dog"]


def test_texts_of_an_item_are_tokenised_with_the_prompt_around_them() -> None:
    text = "the quick</s>s and</s> </s>"
    typed = text.index("</s>")  # as a user wrote it; the other two are places
    prompt = Rendered(text, [(typed, typed + 4)])
    media = [item("video"), item("video")]
    texts = expand.write(media, CaptionedRule(), TOKENIZER)
    spoken = expand.with_texts(prompt, PLACEHOLDERS, {"image": [], "video": texts})
    assert spoken.text == "the quick</s>s andfox 1: </s> dog fox 2: </s> dog"
    assert [spoken.text[start:end] for start, end in spoken.plain] == ["</s>"]
    slotted = expand.tokenize(spoken, PLACEHOLDERS, TOKENIZER, add_special_tokens=False)
    expanded = expand.expand(slotted, texts)
    clip = [ROW, CLIP, END, *ids("\nfox:"), ROW, CLIP]
    between, behind = ids(" dog fox 2: "), ids(" dog")
    assert expanded.token_ids[-len(behind) - len(clip) :] == [*clip, *behind]
    assert expanded.token_ids == [*slotted.pieces[0], *clip, *between, *clip, *behind]
    assert TOKENIZER.decode(slotted.pieces[0]) == "the quick</s>s andfox 1: "
    assert expand.match_expanded(expanded.token_ids, texts) == expanded


def test_texts_of_an_item_in_a_prompt_of_ids_are_tokens_of_their_own() -> None:
    (text,) = expand.write([item("video")], CaptionedRule(), TOKENIZER)
    slotted = expand.cut([9, 2, 9], PLACEHOLDERS)
    expanded = expand.expand(slotted, [text.with_texts(TOKENIZER)])
    clip = [ROW, CLIP, END, *ids("\nfox:"), ROW, CLIP]
    assert expanded.token_ids == [9, *ids("fox 1: "), *clip, *ids(" dog"), 9]
    assert [span.length for span in expanded.spans] == [1, 1]
