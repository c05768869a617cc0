"""Clients that people use, unchanged, each in an environment of its own, against a server with the demo model.

    python tests/clients/run.py [NAME...]

Environments are made once, under ``.clients``, and again when their ranges change (needs the package indexes). A client
is a script that gets the server's address and a picture's data URL, and fails if an answer is not as it should be.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".clients"
PICTURE = ROOT / "src" / "opsin" / "demo" / "pictures" / "animals.png"
PORT = 8791


class Client(NamedTuple):
    """A script beside this file, and the packages that it needs, in the range that was tried."""

    script: str
    packages: tuple[str, ...]


CLIENTS = {
    "openai-node": Client("openai_node.mjs", ("openai@^7",)),
    "ai-sdk": Client("ai_sdk.mjs", ("ai@^7", "@ai-sdk/openai-compatible@^3", "zod@^4")),
    "langchain": Client("langchain_client.py", ("langchain-openai>=1,<2",)),
    "instructor": Client("instructor_client.py", ("instructor>=1.11,<2",)),
    "litellm": Client("litellm_client.py", ("litellm>=1.80,<2",)),
    "schemathesis": Client("schemathesis_client.py", ("schemathesis>=4,<5",)),
}


def main(names: list[str]) -> int:
    picture = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    url = f"http://127.0.0.1:{PORT}"
    server = subprocess.Popen([sys.executable, "-m", "opsin.cli.main", "serve", "demo", "--port", str(PORT)])
    failed: list[str] = []
    try:
        wait_until_ready(url, server)
        for name in names or list(CLIENTS):
            command = prepare(name, CLIENTS[name])
            # The picture goes through stdin: it is longer than a command line may be.
            done = subprocess.run([*command, url], input=picture, text=True, cwd=ENVIRONMENTS / name, timeout=900)
            print(f"{name}: {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
            failed += [name] * (done.returncode != 0)
    finally:
        server.terminate()
        server.wait(60)
    return 1 if failed else 0


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit("The server has ended.")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit("The server is not ready after two minutes.")


def prepare(name: str, client: Client) -> list[str]:
    """Make the client's environment if there is none of these packages yet; the command that runs its script."""
    folder = ENVIRONMENTS / name
    ready, packages = folder / ".ready", "\n".join(client.packages)
    is_made = ready.exists() and ready.read_text() == packages
    if not is_made:
        shutil.rmtree(folder, ignore_errors=True)
    if client.script.endswith(".mjs"):
        if not is_made:
            folder.mkdir(parents=True)
            subprocess.run(
                ["npm", "install", "--silent", "--no-audit", "--no-fund", *client.packages], cwd=folder, check=True
            )
            ready.write_text(packages)
        script = folder / client.script  # Node looks for packages beside the script
        script.write_text((HERE / client.script).read_text())
        return ["node", str(script)]
    python = folder / "bin" / "python"
    if not is_made:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *client.packages], check=True)
        ready.write_text(packages)
    return [str(python), str(HERE / client.script)]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main(sys.argv[1:]))
