"""An engine process without a model: the other end of ``RemoteEngine``, which misbehaves as its "model" is called."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

import msgspec

from opsin.engine.channel import EngineEnd
from opsin.engine.engine import EngineFacts
from opsin.engine.messages import Add, Beat, FromEngine, Load, Loaded, LoadFailed, News, ToEngine, unpack_sources
from opsin.runner.executor import MemoryPlan
from opsin.types import ModelSpec, RequestUpdate

BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[2:]; from tests.engine import fake_process; fake_process.main(int(sys.argv[1]))"
)
SPEC = ModelSpec(architecture="none", vocab_size=8, hidden_size=4, feature_width=4, max_position=64, layers=())
FACTS = EngineFacts(SPEC, 64, 4, MemoryPlan(0, 0, 0, 0, 0, 1, 16), "cpu", "float32")


def main(descriptor: int) -> None:
    end = EngineEnd(socket.socket(fileno=descriptor))
    decoder = msgspec.msgpack.Decoder(ToEngine)
    load = decoder.decode(end.receive()[0])
    assert isinstance(load, Load)
    behaviour = load.config.model.model
    silent = threading.Event()
    step_begun_s: list[float | None] = [None]

    def send(message: FromEngine) -> None:
        end.send(msgspec.msgpack.encode(message))

    def beat() -> None:
        while not silent.is_set():
            send(Beat(step_begun_s[0], {"num_requests_running": 1.0}, {}))
            time.sleep(0.05)

    if behaviour == "refuses":
        send(LoadFailed("UnsupportedModelError", "no such architecture"))
    if behaviour == "dies at once":
        sys.exit(3)
    if behaviour == "is killed at once":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=beat, daemon=True).start()
    send(Loaded(FACTS))
    while True:
        try:
            body, memory = end.receive()
        except EOFError:
            return
        message = decoder.decode(body)
        if not isinstance(message, Add):
            continue
        digests = [source.digest.hex() for source in unpack_sources(message.sources, memory)]
        match behaviour:
            case "answers":
                ids = [request.request_id for request in message.requests]
                send(News([RequestUpdate(request_id=i, error=" ".join(digests), finish_reason="error") for i in ids]))
            case "dies":
                os._exit(7)
            case "babbles":
                end.send(os.urandom(64))
            case "nests without end":
                end.send(b"\x83\xa4type\xa4News\xa7updates\x90\xa1x" + b"\x91" * 10**6)
            case "lies about lengths":
                end._connection.sendall(b"\xff" * 64)
            case "falls silent":
                silent.set()
            case "is stuck":
                step_begun_s[0] = time.monotonic()
            case "stops reading":
                silent.wait()
            case _:
                raise AssertionError(behaviour)
