"""``opsin run`` and what every command does with errors."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import opsin
from opsin.errors import MediaError, OpsinError, RequestError
from tests.cli.fakes import MEMORY, FakeLLM

Command = Callable[..., tuple[int, str, str]]


def test_run_prints_the_answer_alone_on_stdout(fake_llm: type[FakeLLM], opsin_command: Command, picture: Path) -> None:
    code, out, err = opsin_command("run", picture, "What is it?", "--temperature", "0.5", "--max-num-seqs", "2")
    assert (code, out) == (0, "A red circle.\n")
    assert "20 prompt tokens, 16 of them pictures, 4 cached" in err
    assert "3 answer tokens, 4.0 tokens/s" in err
    messages, params = fake_llm.last.asked[0]
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert params.temperature == 0.5
    assert params.max_tokens == 256
    assert fake_llm.last.settings == {"max_num_seqs": 2}
    assert fake_llm.last.is_shut_down


def test_run_on_a_terminal_prints_no_control_characters(
    fake_llm: type[FakeLLM], opsin_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_llm, "words", ("one\n\ttwo", "\x1b[2J", "\x9b1m\r."))
    assert opsin_command("run", "-q", "What?")[1] == "one\n\ttwo\x1b[2J\x9b1m\r.\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert opsin_command("run", "-q", "What?")[1] == "one\n\ttwo\ufffd[2J\ufffd1m\ufffd.\n"


def test_run_quiet_prints_nothing_on_stderr(fake_llm: type[FakeLLM], opsin_command: Command, picture: Path) -> None:
    assert opsin_command("run", "-q", picture, "What?") == (0, "A red circle.\n", "")


def test_run_without_a_question_asks_what_is_in_the_picture(
    fake_llm: type[FakeLLM], opsin_command: Command, picture: Path
) -> None:
    assert opsin_command("run", "-q", picture)[0] == 0
    assert fake_llm.last.asked[0][0][0]["content"][1] == {"type": "text", "text": "What is in the picture?"}


def test_run_with_json_prints_one_object(fake_llm: type[FakeLLM], opsin_command: Command, picture: Path) -> None:
    code, out, _ = opsin_command("run", picture, "What?", "--json", "--system", "Be brief.")
    report = json.loads(out)
    assert code == 0
    assert report["answer"] == "A red circle."
    assert report["finish_reason"] == "stop"
    assert report["media_tokens"] == 16
    assert report["memory"] == MEMORY._asdict()
    assert report["pictures"] == [str(picture)]
    assert fake_llm.last.asked[0][0][0] == {"role": "system", "content": "Be brief."}


def test_run_with_yaml_takes_answer_flags_too(
    fake_llm: type[FakeLLM], opsin_command: Command, picture: Path, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("max-tokens: 5\nblock_size: 8\nquiet: true\n")
    code, _, err = opsin_command("run", "--config", config, picture, "What?", "--block-size", "32")
    assert (code, err) == (0, "")
    assert fake_llm.last.asked[0][1].max_tokens == 5
    assert fake_llm.last.settings == {"block_size": 32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png", "What?"], "There is no picture 'nowhere.png'"),
        (["What?", "--temperature", "-1"], "temperature is -1.0"),
        (["What?", "--block-size", "0"], "block_size is 0; it must be at least 1."),
        (["What?", "--config", "nowhere.yaml"], "Cannot read --config nowhere.yaml"),
    ],
)
def test_run_with_wrong_input_exits_2_with_one_line(
    fake_llm: type[FakeLLM], opsin_command: Command, arguments: list[str], message: str
) -> None:
    code, out, err = opsin_command("run", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("opsin: error: ")
    assert err.count("\n") == 1


def test_run_reports_the_engines_error_and_shuts_it_down(
    fake_llm: type[FakeLLM], opsin_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: OpsinError = RequestError("The prompt is wrong.")
    monkeypatch.setattr(fake_llm, "error", error)
    assert opsin_command("run", "What?") == (2, "", "opsin: error: The prompt is wrong.\n")
    assert fake_llm.last.is_shut_down


def test_run_interrupted_aborts_and_exits_130(
    fake_llm: type[FakeLLM], opsin_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_llm, "interrupt_after", 1)
    code, out, _ = opsin_command("run", "What?")
    assert (code, out) == (130, "A ")
    assert fake_llm.last.aborted == ["cli-0"]
    assert fake_llm.last.is_shut_down


def test_run_interrupted_while_it_loads_loads_no_further(
    fake_llm: type[FakeLLM], opsin_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []

    def load(**settings: object) -> None:
        reached.append("begin")
        signal.raise_signal(signal.SIGINT)
        reached.append("end")

    monkeypatch.setattr(opsin, "AsyncLLM", load)
    assert opsin_command("run", "What?")[0] == 130
    assert reached == ["begin"]


def test_no_command_prints_help(opsin_command: Command) -> None:
    code, out, _ = opsin_command()
    assert code == 0
    assert "ask one question about pictures" in out


def test_version_flag_prints_version(opsin_command: Command) -> None:
    assert opsin_command("--version") == (0, f"opsin {opsin.__version__}\n", "")


def test_unknown_command_exits_2(opsin_command: Command) -> None:
    code, _, err = opsin_command("dance")
    assert code == 2
    assert "invalid choice: 'dance'" in err


def test_run_says_which_picture_is_wrong(
    opsin_command: Callable[..., tuple[int, str, str]],
    fake_llm: type[FakeLLM],
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = MediaError("The data is not a picture.", param="messages.1.content.1.image_url")
    monkeypatch.setattr(fake_llm, "error", error)
    other = picture.with_name("other.png")
    other.write_text("text")
    _, _, err = opsin_command("run", picture, other, "What?", "--system", "Be short.")
    assert err == f"opsin: error: {other}: The data is not a picture.\n"
