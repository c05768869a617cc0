"""Nothing that the server's own OpenAPI description allows, or nearly allows, may make it fail.

Twice: as drawn, which mostly ends at the first thing that is wrong; and with what every question needs in its place, so
that the drawn fields around it are read, carried out and answered.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

url = sys.argv[1]
command = Path(sys.executable).with_name("schemathesis")
options = ["--checks", "not_a_server_error", "--max-examples", "25", "--request-timeout", "60", "--seed", "7"]
failed = 0
for hooks in ({}, {"SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("schemathesis_hooks.py"))}):
    done = subprocess.run(
        [str(command), "run", f"{url}/openapi.json", *options], env={**os.environ, **hooks}, check=False
    )
    failed += done.returncode != 0
with urllib.request.urlopen(f"{url}/load", timeout=60) as answer:
    left = json.load(answer)
assert left == {"server_load": 0}, left
raise SystemExit(1 if failed else 0)
