"""What a process that does strangers' work may still do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
from opsin.media.confine import confine
hard, wanted = int(sys.argv[1]), 2**33
if hard:
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
confine(wanted)
print(resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CORE))
"""


@pytest.mark.parametrize(("hard", "left"), [(0, 2**33), (2**32, 2**32), (2**34, 2**33)])
def test_memory_is_bounded_by_the_lower_of_both_limits(hard: int, left: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _PROGRAM, str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == (f"({left}, {left}) (0, 0)\n", "")
