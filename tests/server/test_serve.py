"""``opsin serve`` as a process: flags, banner, signals."""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from opsin.cli import flags, serve
from opsin.cli.main import build_parser, main
from opsin.errors import ConfigError, RequestError
from opsin.server.config import ServerConfig
from tests.server.conftest import chat

if TYPE_CHECKING:
    from tests.factory import LlavaShape

ROOT = Path(__file__).resolve().parents[2]


def parsed(*argv: str) -> argparse.Namespace:
    return flags.parse(build_parser(), ["serve", *argv])


def test_flags_make_the_servers_settings():
    args = parsed(
        *("org/model", "--port", "1234", "--api-key", "a,b", "--api-key=c", "--served-model-name", '["x", "y"]'),
        *("--max-queue", "7", "--enable-prompt-tokens-details", "--task", "embedding"),
    )
    config = serve.server_config(args)
    assert config == ServerConfig(
        port=1234,
        api_key=("a,b", "c"),
        served_model_name=("x", "y"),
        max_queue=7,
        enable_prompt_tokens_details=True,
    )
    assert (args.model, args.runner) == ("org/model", "pooling")
    assert serve.server_config(parsed()) == ServerConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port is 70000"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"api_key": ("",)}, "api_key is empty"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0"),
    ],
)
def test_setting_out_of_range_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**settings)


def test_serving_is_stricter_than_the_engine_unless_told():
    strict = serve.serving_settings({"model": "m"}, {})
    assert strict["limit_mm_per_prompt"] == {"image": 16, "video": 2}
    assert strict["media_workers"] >= 1
    assert "image_fetch_timeout_s" not in strict
    given = {"limit_mm_per_prompt": {"image": 99}, "media_workers": 3}
    assert given.items() <= serve.serving_settings(given, {}).items()
    with pytest.raises(ConfigError, match="media_workers"):
        serve.serving_settings({"media_workers": 0}, {})


def test_fetch_timeout_comes_from_the_flag_then_our_variable_then_vllms():
    def timeout(settings: dict[str, Any], **environment: str) -> Any:
        return serve.serving_settings(settings, environment).get("image_fetch_timeout_s")

    both = {"OPSIN_IMAGE_FETCH_TIMEOUT": "7", "VLLM_IMAGE_FETCH_TIMEOUT": "8"}
    assert timeout({"image_fetch_timeout_s": 6.0}, **both) == 6
    assert timeout({}, **both) == 7
    assert timeout({}, VLLM_IMAGE_FETCH_TIMEOUT="8") == 8
    for wrong in ("soon", "-1"):
        with pytest.raises(ConfigError):
            timeout({}, OPSIN_IMAGE_FETCH_TIMEOUT=wrong)


@pytest.mark.parametrize(
    ("config", "warns"),
    [
        (ServerConfig(), False),
        (ServerConfig(host="::1"), False),
        (ServerConfig(host="0.0.0.0"), True),
        (ServerConfig(host="0.0.0.0", api_key=("k",)), False),
        (ServerConfig(host="0.0.0.0", uds="/tmp/x"), False),
    ],
    ids=["loopback", "loopback 6", "open", "open with a key", "socket"],
)
def test_banner_warns_of_an_open_server(config: ServerConfig, warns: bool):
    text = serve.banner("http://x", config, "name")
    assert ("WARNING" in text) == warns
    assert not config.api_key or "k" not in re.findall(r"Bearer (\S+)", text)


def test_banner_says_what_pictures_cost():
    def tokens(width: int, height: int) -> int:
        if width > 1500:
            raise RequestError("too large")
        return 256 if width < 1000 else 1024

    assert serve.picture_line(tokens) == "Tokens per picture: 256 at 224x224 or 640x480, 1024 at 1280x720"

    def none(width: int, height: int) -> int:
        raise RequestError("This model takes no pictures.")

    assert serve.picture_line(none) == ""


def test_busy_port_costs_one_line_and_no_model(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "/no/such/model", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in error
    assert "--port" in error
    assert error.count("\n") == 1


def test_missing_model_costs_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "/no/such/model", "--port", "0"]) == 2
    assert "/no/such/model" in capsys.readouterr().err


@contextmanager
def process(*flags: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A server and the lines that it printed until it was ready."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OPSIN_API_KEY": "secret"}
    command = [sys.executable, "-m", "opsin", "serve", *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert server.stderr is not None
    lines: list[str] = []
    try:
        while not (lines and lines[-1].startswith("curl ")):
            line = server.stderr.readline()
            assert line, "".join(lines)
            lines.append(line)
        yield server, lines
    finally:
        server.kill()
        server.communicate()


def paste(line: str) -> str:
    """What a shell makes of a line."""
    environment = {**os.environ, "OPSIN_API_KEY": "secret", "NO_PROXY": "*", "no_proxy": "*"}
    return subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=60).stdout


def served(tiny_llava: Callable[[LlavaShape], Path]) -> Sequence[str]:
    from tests.factory import LlavaShape

    return str(tiny_llava(LlavaShape(num_kv_heads=2))), "--served-model-name", "tiny"


def test_server_works_as_its_banner_says_and_drains_on_sigterm(tiny_llava: Callable[[LlavaShape], Path]):
    with process(*served(tiny_llava), "--port", "0", "--api-key", "secret") as (server, lines):
        assert '"finish_reason"' in paste(lines[-1])
        for told in ("KV cache", "requests of", "on cpu in float32", "Tokens per picture: "):
            assert any(told in line for line in lines), told
        found = re.search(r"at (http://\S+)", "".join(lines))
        assert found is not None
        headers = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=found[1], headers=headers, timeout=30, trust_env=False) as client:
            with client.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=450, n=8)) as running:
                events = running.iter_lines()
                next(events)
                server.send_signal(signal.SIGTERM)
                rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        assert sum('"finish_reason":"length"' in line for line in rest) > 0
        assert server.wait(20) == 0
        assert server.stderr is not None
        log = server.stderr.read()
        assert log.endswith("Stopped.\n")
        assert "Traceback" not in log
        assert "secret" not in log


def test_banner_of_a_server_of_vectors_asks_for_one(tiny_llava: Callable[[LlavaShape], Path]):
    with process(*served(tiny_llava), "--port", "0", "--task", "embedding") as (_, lines):
        assert json.loads(paste(lines[-1]))["data"][0]["embedding"]


def test_second_signal_ends_streams_with_an_error(tiny_llava: Callable[[LlavaShape], Path], tmp_path: Path):
    path = tmp_path / "socket"
    with process(*served(tiny_llava), "--uds", str(path)) as (server, lines):
        assert path.stat().st_mode & 0o077 == 0
        assert '"finish_reason"' in paste(lines[-1])
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(base_url="http://localhost", transport=transport, timeout=30) as client:
            body = chat(stream=True, max_tokens=480, n=16)
            with client.stream("POST", "/v1/chat/completions", json=body) as running:
                events = running.iter_lines()
                next(events)
                server.send_signal(signal.SIGINT)
                server.send_signal(signal.SIGTERM)
                rest = [line for line in events if line]
        assert '"code":"engine_stopped"' in rest[-1]
        assert server.wait(20) == 0
    assert not path.exists()


def test_drain_timeout_that_passes_ends_streams_with_an_error(tiny_llava: Callable[[LlavaShape], Path]):
    with process(*served(tiny_llava), "--port", "0", "--drain-timeout-s", "0.3") as (server, lines):
        found = re.search(r"at (http://\S+)", "".join(lines))
        assert found is not None
        with httpx.Client(base_url=found[1], timeout=30, trust_env=False) as client:
            with client.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=480, n=16)) as running:
                events = running.iter_lines()
                next(events)
                server.send_signal(signal.SIGTERM)
                rest = [line for line in events if line]
        assert '"code":"engine_stopped"' in rest[-1]
        assert server.wait(20) == 0


def test_what_pillow_finds_odd_in_pictures_is_not_logged(tiny_llava: Callable[[LlavaShape], Path]):
    odd = Image.Exif()
    odd[0x0110] = "a camera"  # its text, cut off here, lies behind the table of tags
    file = io.BytesIO()
    Image.new("RGB", (50, 40)).save(file, "JPEG", exif=odd.tobytes()[:-8])
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    with process(*served(tiny_llava), "--port", "0") as (server, lines):
        found = re.search(r"at (http://\S+)", "".join(lines))
        assert found is not None
        with httpx.Client(base_url=found[1], timeout=30, trust_env=False) as client:
            body = chat({"type": "image_url", "image_url": {"url": url}})
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            assert client.post("/page/seen", json={"image_url": url}).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert server.stderr is not None
        assert "PIL" not in server.stderr.read()
