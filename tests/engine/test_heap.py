"""What was freed goes back to the kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from opsin.engine import heap

# In a process of its own: what else a test process has freed is nobody's guess. Every other piece is freed, so none
# of it lies at the heap's top, and each is below what glibc would map by itself.
_PROGRAM = """
import os, sys
from opsin.engine.heap import give_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

pieces = [bytearray(b"x" * 65536) for _ in range(1600)]
del pieces[::2]
full = resident()
gave = give_back()
sys.exit(0 if gave and full - resident() > 40 * 2**20 else 1)
"""


@pytest.mark.skipif(heap._malloc_trim is None, reason="needs glibc")
def test_freed_memory_that_lies_below_what_is_used_goes_back():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, timeout=60).returncode == 0


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heap, "_malloc_trim", None)
    assert not heap.give_back()
