"""The benchmarks' own parts: what they start, what they end, and what they make of figures."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a file of benchmarks/ as a script there does."""
    import importlib

    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_table_of_two_engines_quotes_the_better_run_and_the_ratio(benchmark: Callable[[str], Any]) -> None:
    tables = benchmark("tables")
    figures = [tables.Figure("w1", "W1", True), tables.Figure("ms", "first", False), tables.Figure("x", "x", None)]
    reports = {"opsin": {"w1": [70.0, 80.0], "ms": 20.0, "x": 1}, "vllm": {"w1": [40.0, 30.0], "ms": 60.0}}
    head, rate, time_ms, other = tables.side_by_side(figures, reports).splitlines()
    assert head.split() == ["opsin", "vllm", "opsin", "/", "vllm"]
    assert rate.split() == ["W1", "70.0", "/", "80.0", "40.0", "/", "30.0", "2.00"]
    assert time_ms.split() == ["first", "20.0", "60.0", "3.00"]
    assert other.split() == ["x", "1", "not", "run"]


def test_limits_are_read_for_all_or_by_engine(benchmark: Callable[[str], Any]) -> None:
    limits = benchmark("offline").limits
    assert limits("300") == {"default": 300.0}
    assert limits("opsin=60,vllm=200.5") == {"default": 400.0, "opsin": 60.0, "vllm": 200.5}
    with pytest.raises(argparse.ArgumentTypeError, match="none of"):
        limits("sglang=3")


def test_task_survives_the_way_to_its_worker(benchmark: Callable[[str], Any]) -> None:
    worker = benchmark("worker")
    task = worker.Task("vllm", "qwen2vl-2b", "m", "p", ["w1", "w2"], {"a": {"b": 1}})
    assert worker.Task(**json.loads(task.to_json())) == task


def test_vllm_server_is_started_tuned_and_with_the_peer_s_own_path(benchmark: Callable[[str], Any]) -> None:
    served, offline = benchmark("served"), benchmark("offline")
    args = served._arguments(["--vllm-flags", "--max-model-len 4096", "--vllm-python", "/py"])
    command = served.command("vllm-tuned", Path("/m/qwen2vl-2b"), 1234, args)
    assert command[:5] == ["/py", "-m", "vllm.entrypoints.cli.main", "serve", "/m/qwen2vl-2b"]
    assert command[command.index("--api-server-count") + 1] == "4"
    assert command[-2:] == ["--max-model-len", "4096"]
    assert "--api-server-count" not in served.command("vllm", Path("/m"), 1234, args)
    assert served.command("opsin", Path("/m"), 1, args)[1:4] == ["-m", "opsin", "serve"]
    assert offline.peer_environment("vllm-tuned", "/site")["PYTHONPATH"] == "/site"
    assert offline.peer_environment("vllm", None)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert offline.peer_environment("opsin", "/site") == {}


def test_load_is_read_from_streams_requests_and_tokens(benchmark: Callable[[str], Any]) -> None:
    served = benchmark("served")
    assert served._arguments(["--load", "1:2:3,4:5:6"]).load == [(1, 2, 3), (4, 5, 6)]
    with pytest.raises(argparse.ArgumentTypeError, match="STREAMS"):
        served.Load.read("1:0:3")


def test_program_that_is_left_takes_its_children_along(benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    processes = benchmark("processes")
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); "
    code += "sys.stdout.flush(); time.sleep(600)"
    before = signal.getsignal(signal.SIGTERM)
    with processes.started([sys.executable, "-c", code], {}, tmp_path / "log", piped=True) as process:
        pid = int(next(processes.lines_until(process, time.monotonic() + 60)))
        os.kill(pid, 0)
    assert process.returncode == -signal.SIGKILL
    with contextlib.suppress(OSError):  # it may be a zombie that its new parent has yet to look at
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    assert signal.getsignal(signal.SIGTERM) is before


def test_lines_end_when_the_time_is_up(benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    processes = benchmark("processes")
    begun_s = time.monotonic()
    with processes.started(
        [sys.executable, "-c", "import time; time.sleep(600)"], {}, tmp_path / "log", piped=True
    ) as process:
        assert list(processes.lines_until(process, begun_s + 0.1)) == []
        assert process.poll() is None
    assert time.monotonic() - begun_s < 60


def test_client_reads_events_across_chunks(benchmark: Callable[[str], Any]) -> None:
    load = benchmark("load")
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [], "usage": {"completion_tokens": 7}},
    ]
    text = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    pieces = [text[:10], text[10:90], text[90:]]
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer += b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"

    async def serve() -> tuple[list[Any], bytes]:
        asked = b""

        async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            for _ in range(2):
                head = await reader.readuntil(b"\r\n\r\n")
                asked = await reader.readexactly(int(head.rpartition(b"Content-Length: ")[2]))
                writer.write(answer)
            await reader.read()
            writer.close()

        server = await asyncio.start_server(answer_all, "127.0.0.1", 0)
        async with server:
            replies, _ = await load.run(server.sockets[0].getsockname()[1], [load.body("m", b"jpeg", 1, 7)] * 2, 1)
        return replies, asked

    replies, asked = asyncio.run(serve())
    assert [reply.tokens for reply in replies] == [7, 7]
    assert all(0 < reply.first_s <= reply.total_s for reply in replies)
    assert json.loads(asked)["max_tokens"] == 7


def test_gpu_decode_tells_rates_and_errors_of_each_sampling_in_lines(benchmark: Callable[[str], Any]) -> None:
    import torch

    from opsin.kernels.nvjpeg import Jpeg, JpegDecoder
    from tests.kernels.nvjpeg_stand_in import StandIn

    gpu_decode = benchmark("gpu_decode")
    decoder = JpegDecoder(StandIn(), torch.device("cpu"), None)
    photo = Jpeg(gpu_decode.photo(64, 48, 0), 64, 48)
    errors = {name: gpu_decode.pixel_error(decoder, jpeg) for name, jpeg in gpu_decode.samplings(photo)}
    exact = {"max": 0, "mean": 0.0, "share_off_by_over_3": 0.0}
    assert errors == dict.fromkeys(["4:4:4", "4:2:2", "4:2:0", "grey"], exact)
    assert gpu_decode.pixel_error(decoder, photo._replace(width=63)) == "not taken"
    assert gpu_decode.rate(lambda round: 4).keys() == {"pictures_per_s", "ms_per_picture"}
    assert gpu_decode.in_lines({"a": {"x": 1, "y": 2}, "b": "none"}) == {"a": "x 1, y 2", "b": "none"}


@pytest.mark.parametrize("flags", [[], ["--mixed"], ["--sampled"], ["--first"]])
def test_host_step_times_every_stage(
    benchmark: Callable[[str], Any], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    benchmark("host_step").main(["--rows", "2", "--runs", "1", "--json", str(report), *flags])
    figures = json.loads(report.read_text())["rows"]["2"]
    assert figures["launch"] > 0
    assert figures["total"] >= figures["plan"] + figures["launch"]
    assert capsys.readouterr().out.startswith("rows")
