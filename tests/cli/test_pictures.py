"""Telling pictures from prose in arguments and typed lines."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from opsin.cli import pictures
from opsin.errors import MediaError


def test_inputs_with_question_last_are_split(picture: Path) -> None:
    assert pictures.split_inputs([str(picture), "What is it?"]) == ([str(picture)], ["What is it?"])


def test_inputs_without_question_have_no_text(picture: Path) -> None:
    assert pictures.split_inputs([str(picture), str(picture)]) == ([str(picture)] * 2, [])


def test_inputs_of_a_question_alone_have_no_pictures() -> None:
    assert pictures.split_inputs(["Hello?"]) == ([], ["Hello?"])


def test_inputs_with_answers_behind_the_question_keep_them(picture: Path) -> None:
    assert pictures.split_inputs([str(picture), "Is it?", "yes", "no"]) == ([str(picture)], ["Is it?", "yes", "no"])


def test_question_behind_a_picture_may_look_like_a_model(picture: Path) -> None:
    assert pictures.split_inputs([str(picture), "cat/dog"], most_texts=1) == ([str(picture)], ["cat/dog"])


def test_inputs_accept_urls() -> None:
    url = "https://example.org/a"
    assert pictures.split_inputs([url, "Who?"]) == ([url], ["Who?"])
    assert pictures.split_inputs([url]) == ([url], [])


@pytest.mark.parametrize(
    "inputs", [["nowhere.png", "What?"], ["nowhere.png"], ["What?", "and what?"], ["What?", "nowhere.png"]]
)
def test_inputs_naming_no_picture_raise_media_error(inputs: list[str]) -> None:
    with pytest.raises(MediaError, match=f"There is no picture '{re.escape(inputs[0])}'"):
        pictures.split_inputs(inputs, most_texts=1)


@pytest.mark.parametrize("model", ["demo", "org/name", "."])
def test_inputs_that_begin_with_a_model_raise_media_error_that_says_its_flag(model: str, picture: Path) -> None:
    with pytest.raises(MediaError, match=f"A model is given as --model {re.escape(model)}"):
        pictures.split_inputs([model, str(picture), "What?"])


def test_question_that_ends_like_a_file_name_is_a_question(picture: Path) -> None:
    assert pictures.split_inputs([str(picture), "Is this photo.png"])[1] == ["Is this photo.png"]


def test_line_with_quoted_path_gives_picture_and_text(picture: Path) -> None:
    assert pictures.split_line(f"what is  '{picture}' about?") == ([str(picture)], "what is about?")


def test_line_with_escaped_path_as_terminals_paste_it(picture: Path) -> None:
    escaped = str(picture).replace(" ", "\\ ")
    assert pictures.split_line(f"{escaped} what is it?") == ([str(picture)], "what is it?")


def test_line_with_file_url_and_web_url(picture: Path) -> None:
    line = f"compare {picture.as_uri()} with https://example.org/b.jpg?size=2"
    assert pictures.split_line(line) == ([picture.as_uri(), "https://example.org/b.jpg?size=2"], "compare with")


@pytest.mark.parametrize("line", ["it's a nowhere.png, isn't it", "see https://example.org/page", "don't \\ panic"])
def test_line_without_pictures_is_left_alone(line: str) -> None:
    assert pictures.split_line(line) == ([], line)


def test_picture_url_embeds_the_files_own_bytes(picture: Path) -> None:
    head, _, data = pictures.picture_url(str(picture)).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == picture.read_bytes()


def test_picture_url_of_missing_file_raises_media_error(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="No such file"):
        pictures.picture_url(str(tmp_path / "none.png"))


def test_user_message_puts_pictures_before_text() -> None:
    message = pictures.user_message(["https://example.org/a.png"], "Why?")
    assert message == {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            {"type": "text", "text": "Why?"},
        ],
    }


def test_very_long_prose_is_no_file() -> None:
    assert not pictures.is_file("why " * 5000)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("messages.2.content.1.image_url", "b.png: broken"),
        ("messages.2.content.0", "a.png: broken"),
        ("messages.0.content.1.image_url", "broken"),  # of an earlier message
        (None, "One of a.png, b.png: broken"),
    ],
)
def test_error_about_a_picture_names_it(param: str | None, message: str) -> None:
    with pytest.raises(MediaError) as caught, pictures.named(["a.png", "b.png"], 2):
        raise MediaError("broken", code="image_parse_error", param=param)
    assert (str(caught.value), caught.value.code, caught.value.param) == (message, "image_parse_error", param)


@pytest.mark.parametrize(
    ("sources", "message"),
    [(["a.png"], "a.png: broken"), ([], "broken"), (["data:image/png,x"], "a data: URL: broken")],
)
def test_error_found_while_decoding_names_the_only_picture(sources: list[str], message: str) -> None:
    with pytest.raises(MediaError) as caught, pictures.named(sources, 0):
        raise MediaError("broken")
    assert str(caught.value) == message
