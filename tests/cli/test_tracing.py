"""Profiles: what spans add up to, what a watched run records, and the form of a trace."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM, SamplingParams
from opsin.cli.synthetic import photo
from opsin.cli.tracing import Recorder, Span, breakdown, render, watching
from opsin.cli.tracing.breakdown import own_seconds
from opsin.cli.tracing.recorder import HostClock
from opsin.engine import build
from opsin.engine.core import EngineCore
from opsin.kernels.nvjpeg import JpegDecoder
from opsin.media import pool
from opsin.media.raw import MAX_RAW_PIXELS
from opsin.runner.runner import ModelRunner
from tests.kernels.nvjpeg_stand_in import StandIn

NUM_REQUESTS = 3
NUM_TOKENS = 5


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", media_workers=0) as llm:
        yield llm


def ask(llm: LLM, seeds: range) -> None:
    prompts: Any = [
        {"prompt": "USER: <image>\nWhat is it? ASSISTANT:", "multi_modal_data": {"image": photo(96, 64, seed)}}
        for seed in seeds
    ]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True), use_tqdm=False)


@pytest.fixture(scope="module")
def together(llm: LLM) -> Recorder:
    """Requests that ran at the same time."""
    with watching() as recorder:
        ask(llm, range(NUM_REQUESTS))
    return recorder


@pytest.fixture(scope="module")
def in_turn(llm: LLM) -> Recorder:
    """Requests that ran one after the other."""
    with watching() as recorder:
        for seed in range(10, 10 + NUM_REQUESTS):
            ask(llm, range(seed, seed + 1))
    return recorder


def test_pictures_that_the_device_decodes_are_counted_among_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = JpegDecoder(StandIn(), torch.device("cpu"), None)
    monkeypatch.setattr(build, "most_raw_pixels", lambda device: MAX_RAW_PIXELS)
    monkeypatch.setattr(build, "find_nvjpeg", lambda wanted, device: wanted)
    monkeypatch.setattr(build, "open_decoder", lambda library, device, most: decoder)
    with LLM("demo", media_workers=0, jpeg_decoder="gpu") as llm:
        with watching() as recorder:
            ask(llm, range(20, 23))
        media = breakdown(recorder)["media"]
    assert (media["pictures"], media["workers"]) == (3, 1)
    assert {span.lane for span in recorder.spans if span.stage == "decode picture"} == {"media nvJPEG"}
    assert media["waited_for_worker_ms"]["max"] >= 0
    assert media["decode_and_resize_ms"] > 0


def span(stage: str, begin_s: float, end_s: float, **facts: float) -> Span:
    return Span("device", stage, begin_s, end_s, facts)


def test_own_seconds_of_nested_spans_count_the_inner_ones_once() -> None:
    spans = [
        span("tower", 1, 4),
        span("step", 0, 10),
        span("transfer", 2, 3),
        span("sampling", 8, 9),
        span("x", 10, 12),
    ]
    own = {entry.stage: seconds for entry, seconds in own_seconds(spans)}
    assert own == {"step": 6, "tower": 2, "transfer": 1, "sampling": 1, "x": 2}


def test_breakdown_of_a_run_adds_up_to_its_wall_time(together: Recorder) -> None:
    report = breakdown(together)
    for part in ("host", "device"):
        total = sum(row["ms"] for row in report[part].values())
        assert total == pytest.approx(report["wall_ms"], abs=0.1)  # rounding
        assert all(row["ms"] >= 0 for row in report[part].values()), report[part]
    assert report["device"]["idle"]["ms"] < report["wall_ms"]


def test_breakdown_counts_what_was_done(together: Recorder) -> None:
    report = breakdown(together)
    assert report["host"]["open"]["count"] == report["host"]["tokenise"]["count"] == NUM_REQUESTS
    assert report["media"]["pictures"] == NUM_REQUESTS
    assert report["host"]["plan"]["count"] >= report["steps"]["count"] >= NUM_TOKENS
    assert report["requests"]["count"] == NUM_REQUESTS
    assert {"tower", "prefill", "decode", "sampling", "transfer"} <= set(report["device"])


def test_phases_of_every_request_add_up_to_its_latency(together: Recorder) -> None:
    for request in together.requests:
        points = request[1:]
        assert list(points) == sorted(points)
        assert together.begin_s <= points[0]
        assert points[-1] <= together.end_s
    phases = breakdown(together)["requests"]
    parts = [value["mean"] for name, value in phases.items() if name not in ("count", "latency_ms")]
    assert sum(parts) == pytest.approx(phases["latency_ms"]["mean"], abs=0.1)


def test_timeline_of_requests_in_turn_leads_from_the_prompt_to_the_first_token(in_turn: Recorder) -> None:
    timeline = breakdown(in_turn)["timeline"]
    stages = [row["stage"] for row in timeline]
    assert stages[0] == "open"
    assert stages[-1] == "first token"
    wanted = ["open", "tokenise", "decode and resize", "tower", "sampling", "commit", "first token"]
    assert [stage for stage in dict.fromkeys(stages) if stage in wanted] == wanted
    assert "decode" not in stages
    assert timeline[0]["begin_ms"] >= 0
    assert all(row["begin_ms"] <= row["end_ms"] for row in timeline)


def test_timeline_of_requests_at_the_same_time_is_left_out(together: Recorder) -> None:
    report = breakdown(together)
    assert report["timeline"] is None
    assert "until the first token" not in render(report)


def test_watching_leaves_the_engine_as_it_was(llm: LLM, together: Recorder) -> None:
    before = ModelRunner.launch, EngineCore.put_payload, pool._carried_out
    num_spans = len(together.spans)
    with contextlib.suppress(ZeroDivisionError), watching():
        assert ModelRunner.launch is not before[0]
        raise ZeroDivisionError
    assert before == (ModelRunner.launch, EngineCore.put_payload, pool._carried_out)
    ask(llm, range(90, 91))
    assert len(together.spans) == num_spans


def test_trace_has_the_fields_that_perfetto_reads(together: Recorder, tmp_path: Path) -> None:
    together.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(together.spans)
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    wall_us = 1e6 * (together.end_s - together.begin_s)
    for event in spans:
        assert (event["pid"], event["tid"]) in named
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["ts"] + event["dur"] <= wall_us + 1
    lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"host", "media", "device", "media thread"} <= lanes


class LateClock(HostClock):
    """A device that reaches every mark a second after the host has set it, but for a few that it reaches at once."""

    is_host = False

    def __init__(self) -> None:
        self.delay_s = 1.0

    def mark(self) -> float:
        return super().mark() + self.delay_s


def test_device_that_keeps_up_with_the_host_is_launch_bound() -> None:
    clock = LateClock()
    recorder = Recorder(clock)
    with recorder.device_span("decode", {"step": 0, "pictures": 0}):
        pass
    clock.delay_s = 0.0
    with recorder.device_span("prefill", {"step": 1, "pictures": 1}):
        pass
    recorder.finish()
    device = breakdown(recorder)["device"]
    assert "launch_bound_ms" not in device["decode"]
    assert device["prefill"]["launch_bound_ms"] == device["prefill"]["ms"]


def test_device_mark_inside_a_capture_is_left_out() -> None:
    class Capturing(HostClock):
        def mark(self) -> Any:
            return None

    recorder = Recorder(Capturing())
    with recorder.device_span("tower"):
        pass
    recorder.finish()
    assert {entry.lane for entry in recorder.spans} == {"MainThread"}


def test_bench_with_profile_reports_stages_and_writes_a_trace(
    opsin_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    load = (
        "--num-iters",
        "2",
        "--image-size",
        "64x48",
        "--output-len",
        "3",
        "--input-len",
        "4",
        "--media-workers",
        "1",
    )
    code, out, _ = opsin_command("bench", "latency", *load, "--profile", "--trace", trace, "--json", "--quiet")
    assert code == 0
    profile = json.loads(out)["profile"]
    assert profile["requests"]["count"] == profile["media"]["pictures"] == 2
    assert profile["timeline"][-1]["stage"] == "first token"
    assert any("worker" in row["lane"] for row in profile["timeline"])
    assert json.loads(trace.read_text())["traceEvents"]


def test_bench_trace_that_cannot_be_written_is_an_error(
    fake_llm: object, opsin_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = opsin_command("bench", "latency", "--num-iters", "1", "--trace", tmp_path / "no" / "t.json")
    assert code == 2
    assert "Cannot write --trace" in err
