"""Model names to folders: local ones, the package's own, and ids from a hub that runs on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from opsin.errors import ConfigError
from opsin.models.hub import find_model
from tests.factory import LlavaShape

SHA = "a" * 40


def test_find_model_local_folder_is_used_as_it_is(checkpoint):
    folder = checkpoint(LlavaShape())
    files = find_model(str(folder))
    assert files.folder == folder
    assert files.config["architectures"] == ["LlavaForConditionalGeneration"]
    assert files.processor["image_processor_type"] == "CLIPImageProcessor"
    assert files.processor["image_token"] == "<image>"
    assert files.generation_config["eos_token_id"] == 2
    assert files.dtype == "float32"


def test_find_model_overrides_are_merged(checkpoint):
    files = find_model(str(checkpoint(LlavaShape())), overrides={"text_config": {"rms_norm_eps": 0.5}, "x": 1})
    assert files.config["text_config"]["rms_norm_eps"] == 0.5
    assert files.config["text_config"]["hidden_size"] == 64
    assert files.config["x"] == 1


def test_find_model_old_processor_file_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 5, "resample": 3}')
    (tmp_path / "processor_config.json").write_text('{"image_token": "<i>", "image_processor": {"size": 6}}')
    files = find_model(str(tmp_path))
    assert files.processor == {"size": 6, "resample": 3, "image_token": "<i>"}
    assert files.dtype == "float16"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "is not a folder"),
        ("./here", "is not a folder"),
        ("a/b/c", "is not a folder"),
        ("bad name!", "neither a folder nor a Hugging Face id"),
    ],
)
def test_find_model_bad_name_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_model(name)


def test_find_model_folder_of_an_adapter_says_what_it_is(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(ConfigError, match="holds an adapter, not a model: merge it"):
        find_model(str(tmp_path))


def test_find_model_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        find_model(str(tmp_path))


@pytest.fixture
def hub(checkpoint, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A loopback hub with the model ``tiny/llava``, and what was asked of it."""
    folder = checkpoint(LlavaShape())
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    contents["pytorch_model.bin"] = b"pickle"
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            name = path.rpartition("/")[2]
            if path.startswith("/api/models/tiny/llava"):
                if "revision/v9" in path:
                    return self.fail(404, "RevisionNotFound")
                if "/tree/" in path:
                    listing = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in contents.items()]
                    return self.send(json.dumps(listing).encode(), body=body)
                siblings = [{"rfilename": n} for n in contents]
                info = {"id": "tiny/llava", "modelId": "tiny/llava", "sha": SHA, "siblings": siblings, "tags": []}
                return self.send(json.dumps(info).encode(), body=body)
            if path.startswith("/api/models/tiny/gated"):
                return self.fail(403, "GatedRepo")
            if path.startswith("/api/models/tiny/token"):
                return self.fail(401, "")
            if path.startswith("/api/models/tiny/broken"):
                return self.fail(500, "")
            if path.startswith(f"/tiny/llava/resolve/{SHA}/") and name in contents:
                return self.send(contents[name], body=body)
            return self.fail(404, "RepoNotFound")

        def send(self, content: bytes, *, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", SHA)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def ask(
    endpoint: str,
    home: Path,
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    first: str = "",
    **variables: str,
) -> str:
    """Find a model in a process of its own, since huggingface_hub reads its settings when imported.

    Args:
        first: a statement to begin with.
        variables: of the environment.
    """
    code = (
        f"{first}\n"
        "from opsin.errors import ConfigError\n"
        "from opsin.models.hub import find_model\n"
        "try:\n"
        f"    files = find_model({name!r}, revision={revision!r})\n"
        "    print('OK', files.config['model_type'], sorted(p.name for p in files.folder.iterdir()))\n"
        "except ConfigError as error:\n"
        "    print('ConfigError', error)\n"
    )
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": "src",
        **variables,
    }
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return result.stdout


def test_find_model_hub_id_is_downloaded_once_and_without_pickles(hub, tmp_path):
    endpoint, asked = hub
    found = ask(endpoint, tmp_path, "tiny/llava")
    assert found.startswith("OK llava")
    assert "model.safetensors" in found
    assert ".bin" not in found
    assert not any("pytorch_model" in path for path in asked)

    asked.clear()
    assert ask(endpoint, tmp_path, "tiny/llava", offline=True) == found
    assert not asked


def test_find_model_hub_errors_say_what_to_do(hub, tmp_path):
    endpoint, _ = hub
    assert "is gated: accept its terms" in ask(endpoint, tmp_path, "tiny/gated")
    assert "has no model 'tiny/absent'" in ask(endpoint, tmp_path, "tiny/absent")
    assert "has no revision 'v9'" in ask(endpoint, tmp_path, "tiny/llava", revision="v9")
    assert "give its folder as the model" in ask(endpoint, tmp_path, "tiny/llava", offline=True)


@pytest.mark.parametrize(
    ("endpoint", "name", "variables", "said"),
    [
        ("http://127.0.0.1:9", "tiny/llava", {}, "http://127.0.0.1:9 refused the connection. Check the network"),
        ("http://hub.invalid", "tiny/llava", {}, "http://hub.invalid cannot be found (its name does not resolve)"),
        ("https://{hub}", "tiny/llava", {}, "has a certificate that cannot be verified. Check the network"),
        ("http://{hub}", "tiny/llava", {"HTTP_PROXY": "http://127.0.0.1:9"}, "Check the network"),
        ("http://{hub}", "tiny/token", {}, "refused the token (HTTP 401). Log in with `hf auth login`"),
        ("http://{hub}", "tiny/broken", {}, "answered with HTTP status 500. Try again later."),
        ("http://{hub}", "tiny/llava", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps the hub from being asked."),
        ("http://{hub}", "tiny/gated", {}, "is gated: accept its terms"),
        ("http://{hub}", "tiny/absent", {}, "has no model 'tiny/absent'"),
    ],
    ids=["refused", "dns", "tls", "proxy", "token", "broken", "offline", "gated", "absent"],
)
def test_find_model_hub_that_fails_is_told_in_one_line(
    hub: tuple[str, list[str]], tmp_path: Path, endpoint: str, name: str, variables: dict[str, str], said: str
):
    address = hub[0].removeprefix("http://")
    message = ask(endpoint.format(hub=address), tmp_path, name, offline=False, **variables)
    assert message.startswith(f"ConfigError {name} ") or "absent" in name
    assert said in message
    assert "give its folder as the model" in message
    assert message.count("\n") == 1
    assert "Error:" not in message  # no exception's own words


def test_find_model_hub_that_does_not_answer_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    def download(*_: object, **__: object) -> None:  # the real client tries for minutes
        try:
            raise httpx.ConnectTimeout("the handshake\ntimed out")
        except httpx.ConnectTimeout as error:
            raise errors.LocalEntryNotFoundError("Got: ConnectTimeout\nAn error happened") from error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError) as refusal:
        find_model("tiny/slow")
    assert "did not answer in time. Check the network" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_find_model_full_disk_is_told_as_such(hub: tuple[str, list[str]], tmp_path: Path):
    # Writing beyond this limit fails as it does where a disk is full, without root's help to make one.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    message = ask(hub[0], tmp_path, "tiny/llava", first=limit)
    assert "it cannot be written there: File too large. Make room, or set HF_HOME" in message
    assert message.count("\n") == 1
