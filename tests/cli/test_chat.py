"""The terminal conversation, line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opsin.errors import RequestError
from tests.cli.fakes import FakeLLM

Command = Callable[..., tuple[int, str, str]]
Typing = Callable[..., None]


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Typing:
    """Type these lines, then Ctrl-D; an exception stands for the key that causes it."""

    def lines(*typed: str | BaseException) -> None:
        left: Iterator[str | BaseException] = iter(typed)

        def read(prompt: str) -> str:
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return lines


def test_chat_remembers_what_was_said(fake_llm: type[FakeLLM], opsin_command: Command, typing: Typing) -> None:
    typing("Hello.", "And now?")
    code, out, _ = opsin_command("chat", "--system", "Be brief.")
    assert code == 0
    assert out.count("A red circle.") == 2
    roles = [message["role"] for message in fake_llm.last.asked[1][0]]
    assert roles == ["system", "user", "assistant", "user"]
    assert fake_llm.last.asked[1][0][2]["content"] == "A red circle."


def test_chat_image_goes_with_the_next_message(
    fake_llm: type[FakeLLM], opsin_command: Command, typing: Typing, picture: Path
) -> None:
    typing(f"/image {picture}", "What is it?", "And?")
    _, out, _ = opsin_command("chat")
    assert "(1 picture will go with your next message)" in out
    first, second = (messages[-1]["content"] for messages, _ in fake_llm.last.asked)
    assert [part["type"] for part in first] == ["image_url", "text"]
    assert [part["type"] for part in second] == ["text"]


def test_chat_recognises_a_pasted_path(
    fake_llm: type[FakeLLM], opsin_command: Command, typing: Typing, picture: Path
) -> None:
    typing(f"'{picture}'", f"what is new in '{picture}'?")
    opsin_command("chat")
    (messages, _) = fake_llm.last.asked[0]
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "image_url", "text"]
    assert len(fake_llm.last.asked) == 1


def test_chat_clear_forgets(fake_llm: type[FakeLLM], opsin_command: Command, typing: Typing) -> None:
    typing("Hello.", "/clear", "Again.")
    opsin_command("chat")
    assert len(fake_llm.last.asked[1][0]) == 1


def test_chat_exit_leaves_without_asking(fake_llm: type[FakeLLM], opsin_command: Command, typing: Typing) -> None:
    typing("/exit", "never read")
    assert opsin_command("chat")[0] == 0
    assert fake_llm.last.asked == []
    assert fake_llm.last.is_shut_down


def test_chat_ctrl_c_stops_the_answer_and_goes_on(
    fake_llm: type[FakeLLM], opsin_command: Command, typing: Typing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_llm, "interrupt_after", 2)
    typing("Hello.", "Again.")
    code, out, _ = opsin_command("chat")
    assert code == 0
    assert out.count("A red  (stopped)") == 2
    assert fake_llm.last.aborted == ["cli-0", "cli-1"]
    assert fake_llm.last.asked[1][0][1] == {"role": "assistant", "content": "A red "}


def test_chat_ctrl_c_at_the_prompt_goes_on(fake_llm: type[FakeLLM], opsin_command: Command, typing: Typing) -> None:
    typing(KeyboardInterrupt(), "Hello.")
    code, out, _ = opsin_command("chat")
    assert code == 0
    assert "(/exit or Ctrl-D leaves)" in out
    assert len(fake_llm.last.asked) == 1


def test_chat_error_of_one_message_leaves_the_conversation(
    fake_llm: type[FakeLLM], opsin_command: Command, typing: Typing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_llm, "error", RequestError("too long"))
    typing("Hello.", "Again.")
    code, _, err = opsin_command("chat", "-q")
    assert code == 0
    assert err == "error: too long\n" * 2
    assert len(fake_llm.last.asked[1][0]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [("/image nowhere.png", "There is no picture 'nowhere.png'."), ("/dance", "There is no /dance.")],
)
def test_chat_wrong_command_says_so(
    fake_llm: type[FakeLLM], opsin_command: Command, typing: Typing, line: str, message: str
) -> None:
    typing(line)
    assert message in opsin_command("chat")[1]
    assert fake_llm.last.asked == []
