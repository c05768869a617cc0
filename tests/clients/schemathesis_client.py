"""Nothing that the server's own OpenAPI description allows, or nearly allows, may make it fail.

Twice: as drawn, which mostly ends at the first thing that is wrong; and with what every question needs in its place and
two drawn fields beside it, so that those are read, carried out and answered. Schemathesis loads this file for its hook.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import schemathesis

NEEDED = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is in the picture?"}],
    "prompt": "a red",
    "input": "a red circle",
    "question": "What is it?",
    "choices": ["a dog", "a cat"],
    "query": "a red circle",
    "documents": ["a circle", "a dog"],
    "text_1": "a red circle",
    "text_2": ["a circle", "a dog"],
}
SHORT = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    others = [name for name in body if name not in NEEDED]
    first = len(repr(body)) % max(1, len(others))  # any of them, and the same ones whenever this body is drawn
    kept = {name: body[name] for name in others[first : first + 2]}
    return {name: NEEDED[name] for name in body if name in NEEDED} | kept | {name: 4 for name in SHORT if name in kept}


def main(url: str) -> int:
    command = Path(sys.executable).with_name("schemathesis")
    options = ["--checks", "not_a_server_error", "--max-examples", "25", "--request-timeout", "60", "--seed", "7"]
    failed = 0
    for hooks in ({}, {"SCHEMATHESIS_HOOKS": __file__}):
        run = [str(command), "run", f"{url}/openapi.json", *options]
        failed += subprocess.run(run, env={**os.environ, **hooks}, check=False).returncode != 0
    with urllib.request.urlopen(f"{url}/load", timeout=60) as answer:
        left = json.load(answer)
    assert left == {"server_load": 0}, left
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
