"""Measurements: the arithmetic, the pictures, and the report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from opsin.cli.bench import Timeline, summarise
from opsin.cli.synthetic import photo
from tests.cli.fakes import FakeLLM

Command = Callable[..., tuple[int, str, str]]


def test_summary_of_known_timelines_has_the_right_rates() -> None:
    timelines = [Timeline(0.0, 0.1, 1.1, 100, 11), Timeline(0.0, 0.3, 1.3, 100, 11)]
    report = summarise(timelines, 2.0, images_per_prompt=3)
    assert report["requests_per_s"] == 1.0
    assert report["images_per_s"] == 3.0
    assert report["prompt_tokens_per_s"] == 100.0
    assert report["output_tokens_per_s"] == 11.0
    assert report["ttft_ms"]["mean"] == 200.0
    assert report["ttft_ms"]["p50"] == 200.0
    assert report["tpot_ms"]["p99"] == 100.0
    assert report["latency_ms"]["p90"] == 1280.0


def test_summary_of_single_token_answers_has_no_tpot() -> None:
    assert summarise([Timeline(0.0, 0.1, 0.1, 5, 1)], 0.1, 0)["tpot_ms"] is None


def test_photo_of_equal_seeds_is_equal_and_of_others_is_not() -> None:
    assert photo(64, 48, 1) == photo(64, 48, 1)
    assert photo(64, 48, 1) != photo(64, 48, 2)


def test_photo_weighs_what_photographs_weigh() -> None:
    data = photo(640, 480, 0)
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.size, picture.mode) == ("JPEG", (640, 480), "RGB")
    assert 0.05 < len(data) / (640 * 480) < 0.6  # bytes per pixel


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (17, 3)])
def test_photo_takes_any_size(size: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(photo(*size, seed=0))) as picture:
        assert picture.size == size


def test_bench_throughput_reports_every_request(
    fake_llm: type[FakeLLM], opsin_command: Command, tmp_path: Path
) -> None:
    out_file = tmp_path / "r.json"
    code, out, _ = opsin_command(
        "bench", "throughput", "--num-prompts", "3", "--image-size", "32x24", "--output-len", "3", "--json",
        "--output-json", out_file, "--load-format", "dummy",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0
    assert report == json.loads(out_file.read_text())
    assert report["requests"] == 3
    assert report["output_tokens"] == 9
    assert report["environment"]["packages"]["torch"]
    assert report["command"].startswith("opsin bench throughput --num-prompts 3 ")
    assert fake_llm.last.settings == {"load_format": "dummy"}
    sent = [messages[0]["content"][0]["image_url"]["url"] for messages, _ in fake_llm.last.asked]
    assert len(set(sent)) == 4  # three and the warm-up: no two share a picture
    assert all(params.ignore_eos and params.min_tokens == params.max_tokens == 3 for _, params in fake_llm.last.asked)


def test_bench_latency_sends_batches_and_prints_a_table(fake_llm: type[FakeLLM], opsin_command: Command) -> None:
    code, out, _ = opsin_command(
        "bench", "latency", "--batch-size", "2", "--num-iters", "2", "--num-warmup", "0", "--images-per-prompt", "0",
    )  # fmt: skip
    assert code == 0
    assert len(fake_llm.last.asked) == 4
    assert "ttft_ms:" in out
    assert "p99" in out


def test_bench_with_wrong_size_exits_2(opsin_command: Command) -> None:
    code, _, err = opsin_command("bench", "latency", "--image-size", "big")
    assert code == 2
    assert "is not WIDTHxHEIGHT" in err


def test_bench_file_that_cannot_be_written_is_an_error(
    fake_llm: type[FakeLLM], opsin_command: Command, tmp_path: Path
) -> None:
    code, _, err = opsin_command("bench", "latency", "--num-iters", "1", "--output-json", tmp_path / "no" / "r.json")
    assert code == 2
    assert "Cannot write --output-json" in err


def test_collect_env_names_versions_and_no_secrets(opsin_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-value")
    code, out, _ = opsin_command("collect-env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["packages"]["torch"]
    assert facts["device"]
    assert "secret-value" not in out
