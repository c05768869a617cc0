"""Has grammars from afar compiled in processes that may be killed, before anybody else compiles them.

Compiling has no bound of its own, and a thread cannot be ended. These processes hold the model's vocabulary and nothing
else of it; what takes them too long, or kills them, costs its own request a 400.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from opsin.errors import RequestError, RequestFailedError
from opsin.media.confine import confine
from opsin.media.wire import receive, send
from opsin.params import StructuredOutputsParams
from opsin.processing.grammar import compile_matcher, key_of, read_vocabulary, start

MAX_CPU_S = 2.0
_MAX_WALL_S = 15.0  # where others want the cores as well
_START_S = 60.0
_MAX_PROCESSES = 2  # so that a grammar that takes its time does not hold up all others
_MAX_KNOWN = 1024
_MAX_MEMORY_BYTES = 2**29  # beyond what the vocabulary takes
_NICENESS = 5

_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[2:]; from opsin.processing import grammar_prober as p; p.main(sys.argv[1])"
)


class Verdict(msgspec.Struct, frozen=True):
    """What came of compiling; the first one of a process says that it is ready."""

    error: str | None = None


class _Setup(msgspec.Struct, frozen=True):
    connection: int
    vocabulary: int
    vocab_size: int
    eos_token_ids: list[int]
    max_cpu_s: float


@dataclass(slots=True, eq=False)
class _Process:
    process: subprocess.Popen[bytes]
    connection: socket.socket

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class GrammarProber:
    """Implements ``GrammarCheck``. Processes start when they are needed; each caller waits for its own answer.

    Args:
        tokenizer_json: the tokenizer as a tokenizer.json.
        vocab_size: of the logits.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocabulary = os.memfd_create("opsin-vocabulary", os.MFD_CLOEXEC)
        with open(self._vocabulary, "wb", closefd=False) as file:
            file.write(tokenizer_json.encode())
        self._places = threading.BoundedSemaphore(_MAX_PROCESSES)
        self._lock = threading.Lock()  # guards what follows
        self._idle: list[_Process] = []
        self._verdicts: dict[bytes, Verdict] = {}
        self._closed = False

    def check(self, params: StructuredOutputsParams) -> None:
        key = key_of(params)
        verdict = self._verdicts.get(key) or self._compiled(params)
        with self._lock:
            self._verdicts[key] = verdict
            if len(self._verdicts) > _MAX_KNOWN:
                del self._verdicts[next(iter(self._verdicts))]
        if verdict.error is not None:
            raise RequestError(verdict.error, param="structured_outputs")

    def is_known(self, params: StructuredOutputsParams) -> bool:
        return key_of(params) in self._verdicts

    def close(self) -> None:
        """Stop the processes that are idle; those at work stop when they are done."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()
        os.close(self._vocabulary)

    def _compiled(self, params: StructuredOutputsParams) -> Verdict:
        if importlib.util.find_spec("llguidance") is None:
            read_vocabulary("", 0, ())  # says what to install
        with self._places:
            process = self._take()
            try:
                process.connection.settimeout(_MAX_WALL_S)
                send(process.connection, params)
                verdict, _ = receive(process.connection, Verdict)
            except (EOFError, OSError, msgspec.MsgspecError):
                process.close()
                return Verdict(_reason(process.process.returncode))
            except BaseException:
                process.close()
                raise
            self._give_back(process)
        return verdict

    def _take(self) -> _Process:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._closed:
                raise RequestFailedError("The engine was shut down.")
        process = self._start()
        try:
            process.connection.settimeout(_START_S)
            receive(process.connection, Verdict)
        except (EOFError, OSError, msgspec.MsgspecError):
            process.close()
            raise RequestFailedError("The processes that compile grammars do not start; see stderr.") from None
        return process

    def _start(self) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = theirs.fileno(), self._vocabulary
            setup = _Setup(*descriptors, self._vocab_size, self._eos_token_ids, MAX_CPU_S)
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, json.dumps(msgspec.to_builtins(setup)), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,
            )
        return _Process(process, ours)

    def _give_back(self, process: _Process) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(process)
                return
        process.close()


def _reason(status: int) -> str:
    if status in (-signal.SIGPROF, -signal.SIGKILL):  # its own clock ended it, or its caller
        return f"structured_outputs takes longer than {MAX_CPU_S:g} s to compile; ask for something simpler."
    return "structured_outputs is too large to be compiled."


def main(setup: str) -> None:
    """The other side: compile what comes, until the socket closes."""
    given = msgspec.json.decode(setup, type=_Setup)
    os.nice(_NICENESS)
    with open(given.vocabulary, "rb") as file:
        text = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()  # others read it at the same time
    vocabulary = read_vocabulary(text, given.vocab_size, given.eos_token_ids)
    del text
    with open("/proc/self/statm", encoding="ascii") as file:
        num_pages = int(file.read().split()[0])
    confine(num_pages * os.sysconf("SC_PAGE_SIZE") + _MAX_MEMORY_BYTES)
    with socket.socket(fileno=given.connection) as connection:
        try:
            send(connection, Verdict())
            while True:
                params, _ = receive(connection, StructuredOutputsParams)
                signal.setitimer(signal.ITIMER_PROF, given.max_cpu_s)  # SIGPROF ends a process, whatever it is at
                try:
                    start(compile_matcher(vocabulary, params))
                    verdict = Verdict()
                except RequestError as error:
                    verdict = Verdict(str(error))
                signal.setitimer(signal.ITIMER_PROF, 0)
                send(connection, verdict)
        except (EOFError, ConnectionError):
            return
