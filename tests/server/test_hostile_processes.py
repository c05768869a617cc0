"""Between the server's processes: bytes that are no message are data and no more, and nobody else can say anything."""

from __future__ import annotations

import os
import pickle
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import opsin
from opsin.engine import process, remote
from opsin.engine.channel import FrontEnd, frame
from opsin.media.wire import Job, Probe, Reply, receive
from tests.server.conftest import chat
from tests.server.test_engine_process import CHAT, LONG, children, serving

NESTED = b"\x91" * 10**6  # arrays within arrays


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "nothing": lambda _: b"",
    "text": lambda _: b"GET / HTTP/1.1\r\n\r\n",
    "pickle": lambda folder: pickle.dumps(Bomb(folder)),
    "nested": lambda _: NESTED,
    "nested in a field that is unknown": lambda _: b"\x83\xa4type\xa4News\xa7updates\x90\xa1x" + NESTED,
    "nested behind the last field": lambda _: b"\x94\xc0\xc0\xc0" + NESTED,
    "another message": lambda _: msgspec.msgpack.encode({"type": "Execute", "code": "import os"}),
    "string that does not come": lambda _: b"\xdb\xff\xff\xff\xff",
}


def read_by_worker_protocol(body: bytes, kind: type[Any]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = threading.Thread(target=theirs.sendall, args=(frame(body),))  # it is more than a socket holds
        writer.start()
        try:
            receive(ours, kind)
        finally:
            writer.join()


READERS: dict[str, Callable[[bytes], object]] = {
    "front": remote._decoder.decode,
    "engine": process._decoder.decode,
    "pool": lambda body: read_by_worker_protocol(body, Reply),
    "worker": lambda body: read_by_worker_protocol(body, cast("type[Any]", Job | Probe)),
}
# Whoever reads catches these, and nothing else: the process that said it is ended, and another started.
CAUGHT = (msgspec.MsgspecError, RecursionError, EOFError)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_bytes_that_are_no_message_are_refused_and_nothing_of_them_is_run(reader: str, hostile: str, tmp_path: Path):
    folder = tmp_path / "made by a pickle"
    with pytest.raises(CAUGHT):
        READERS[reader](HOSTILE[hostile](folder))
    assert not folder.exists()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=4))
@example([b"\xff" * 8])
@example([frame(b"\xc0") + b"\x01"])
def test_any_bytes_at_the_fronts_end_are_frames_or_an_end(pieces: list[bytes]):
    ours, theirs = socket.socketpair()
    with theirs:
        end = FrontEnd(ours)
        try:
            for piece in pieces:
                theirs.sendall(piece)
                bodies = end.receive()
                assert sum(4 + len(body) for body in bodies) <= sum(map(len, pieces))
                for body in bodies:
                    with pytest.raises(CAUGHT):
                        remote._decoder.decode(body)
        except EOFError:
            pass  # a length that no frame has
        finally:
            end.close()


def test_source_reads_no_pickles():
    root = Path(opsin.__file__).parent
    imports = re.compile(
        r"^\s*(?:import|from) (?:pickle|cloudpickle|dill|shelve|marshal)\b|torch\.load\(", re.MULTILINE
    )
    assert [str(file) for file in root.rglob("*.py") if imports.search(file.read_text(encoding="utf-8"))] == []


def sockets_of(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    targets = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return {target[8:-1] for target in targets if target.startswith("socket:[")}


def test_processes_of_a_server_listen_on_its_port_alone():
    with serving() as (server, client):
        client.post(CHAT, json=chat(1, model="demo", max_tokens=1))  # a media worker, too, is there now
        with client.stream("POST", CHAT, json=chat(stream=True, **LONG)) as running:
            next(running.iter_lines())
            pids = [server.pid, *children(server.pid)]
            assert len(pids) >= 3
            own = set[str]().union(*map(sockets_of, pids))
            table = [line.split() for line in Path("/proc/net/unix").read_text(encoding="ascii").splitlines()[1:]]
            names = [fields[7] for fields in table if fields[6] in own and len(fields) > 7]
            listening = [
                int(fields[1].rpartition(":")[2], 16)
                for version in ("tcp", "tcp6")
                for fields in map(str.split, Path(f"/proc/net/{version}").read_text(encoding="ascii").splitlines()[1:])
                if fields[3] == "0A" and fields[9] in own
            ]
    assert names == []  # unix sockets: all of them pairs, which have no name to connect to
    assert listening == [client.base_url.port]
