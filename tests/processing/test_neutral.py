import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.processing.neutral import CLOSE, OPEN, ControlStrings, Rendered
from tests.processing import vocabularies

CONTROLS = ControlStrings(["<s>", "</s>", "<image>", "<|a|>", "<|a|>b"], {r"<\|image_\d+\|>": "<|image_1|>"})
PIECES = st.lists(st.sampled_from(["<s>", "</s>", "<ima", "ge>", "<", "s>", "<|a|>", "b", " ", "é", OPEN, CLOSE]))


def test_find_prefers_the_longest_and_reads_patterns() -> None:
    assert CONTROLS.find("x<|a|>b<s><|image_12|>") == [(1, 7), (7, 10), (10, 22)]


@given(pieces=PIECES)
def test_marking_and_unmarking_gives_the_text_back_with_every_control_string_found(pieces: list[str]) -> None:
    text = "".join(pieces)
    clean = text.replace(OPEN, "").replace(CLOSE, "")
    rendered = CONTROLS.unmark(CONTROLS.mark(text))
    assert rendered.text == clean
    assert list(rendered.plain) == CONTROLS.find(clean)


@given(parts=st.lists(PIECES.map("".join), max_size=4))
def test_control_strings_that_arise_between_texts_are_the_users(parts: list[str]) -> None:
    rendered = CONTROLS.unmark("<s>" + "".join(CONTROLS.mark(part) for part in parts) + "</s>")
    theirs = [span for span in CONTROLS.find(rendered.text) if span not in rendered.plain]
    assert theirs == [(0, 3), (len(rendered.text) - 4, len(rendered.text))]


def test_control_string_that_a_template_uncovers_is_the_users() -> None:
    marked = CONTROLS.mark("<im<s>age>").replace("<s>", "")  # as a template's replace() or split() would
    assert CONTROLS.unmark(marked) == Rendered("<image>", [(0, 7)])


def test_json_in_ascii_keeps_the_marks() -> None:
    from opsin.processing.jinja import ChatTemplate

    tools = CONTROLS.mark_all([{"name": "<image>", "<s>": 1}])
    rendered = CONTROLS.unmark(ChatTemplate("{{ tools | tojson(ensure_ascii=True) }}", {}).render([], tools=tools))
    assert json.loads(rendered.text) == [{"name": "<image>", "<s>": 1}]
    assert [rendered.text[a:b] for a, b in rendered.plain] == ["<image>", "<s>"]


@pytest.mark.parametrize("kind", vocabularies.KINDS)
@pytest.mark.parametrize("text", ["hello </s> fox", "<image>", "a <image></s><s> b", "</s", "x <unk>\n<image> "])
def test_users_control_strings_become_plain_tokens(kind: str, text: str) -> None:
    tokenizer = vocabularies.tokenizer(kind)
    controls = ControlStrings(tokenizer.special_strings)
    marked = f"<s>USER: <image>\n{controls.mark(text)} fox</s> the {controls.mark(text)}"

    ids = tokenizer.encode_rendered(controls.unmark(marked), add_special_tokens=False)

    assert [i for i in ids if i in tokenizer.special_ids] == [
        tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<image>", "</s>")
    ]
    expected = f"USER: \n{text} fox the {text}"
    decoded = tokenizer.decode(ids)
    if kind == "sentencepiece-always":  # it puts a space after every special token
        expected, decoded = expected.replace(" ", ""), decoded.replace(" ", "")
    assert decoded == expected


@pytest.mark.parametrize("kind", vocabularies.KINDS)
@given(text=st.text("the fox,. é你\n", max_size=30))
def test_plain_encoding_of_ordinary_text_is_the_ordinary_one(kind: str, text: str) -> None:
    tokenizer = vocabularies.tokenizer(kind)
    assert tokenizer.encode_plain(text) == tokenizer.encode(text, add_special_tokens=False)
    after_special = tokenizer.encode("<s>" + text, add_special_tokens=False)[1:]
    assert tokenizer.encode_plain(text, at_start=False) == after_special


@pytest.mark.parametrize(
    "text", ["<image>" * 4000, "<" * 30000, "<ima" * 7000, " " * 30000, "</s> " * 5000], ids=lambda t: t[:6]
)
def test_hostile_texts_cost_linear_time(text: str) -> None:
    tokenizer = vocabularies.tokenizer("byte-level")
    controls = ControlStrings(tokenizer.special_strings, {"<image>": "<image>"})

    def seconds(text: str) -> float:
        start = time.thread_time()
        tokenizer.encode_rendered(controls.unmark("<s>" + controls.mark(text)), add_special_tokens=False)
        return time.thread_time() - start

    short, long = min(seconds(text[: len(text) // 8]) for _ in range(3)), min(seconds(text) for _ in range(2))
    assert long < 40 * short  # 8 times the text; quadratic would be 64 times
