"""``opsin`` with an engine process that computes nothing: each step gives every request its next token, on the clock.

    python benchmarks/idle_engine.py STEP_MS serve MODEL ...

What is left is the front: HTTP, JSON, base64, templates, tokens, text.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec

from opsin.cli.main import main
from opsin.config import EngineConfig
from opsin.engine import child
from opsin.engine.channel import EngineEnd
from opsin.engine.engine import EngineFacts
from opsin.engine.messages import Abort, Add, Beat, FromEngine, Load, Loaded, News, ToEngine, unpack_sources
from opsin.models.hub import find_model
from opsin.params import SamplingParams
from opsin.runner.executor import MemoryPlan
from opsin.types import EngineRequest, ModelSpec, RequestUpdate

_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[2:]; import idle_engine; idle_engine.engine(int(sys.argv[1]), {step_s})"
)
_BEAT_S = 0.2
_NUM_SEQS = 256
_FIRST_ID, _NUM_IDS = 300, 200  # tokens that are words: what answers consist of


class _Answer:
    """A request, and how far it is."""

    def __init__(self, request: EngineRequest) -> None:
        assert isinstance(request.params, SamplingParams)
        self._id = request.request_id
        self._length = request.params.max_tokens or 1
        self._done = 0
        self._scheduled_s = time.monotonic()

    def step(self) -> RequestUpdate:
        token = _FIRST_ID + (7 * self._done) % _NUM_IDS
        self._done += 1
        reason = "length" if self._done == self._length else None
        return RequestUpdate(
            request_id=self._id, token_ids=[token], finish_reason=reason, scheduled_s=self._scheduled_s
        )


def engine(descriptor: int, step_s: float) -> None:
    """The engine process; ends with its front."""
    end = EngineEnd(socket.socket(fileno=descriptor))
    decoder = msgspec.msgpack.Decoder(ToEngine)
    load = decoder.decode(end.receive()[0])
    assert isinstance(load, Load)
    end.send(msgspec.msgpack.encode(Loaded(_facts(load.config))))
    orders: queue.SimpleQueue[Add | Abort] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                body, memory = end.receive()
            except EOFError:
                os._exit(0)
            order = decoder.decode(body)
            if isinstance(order, Add):
                unpack_sources(order.sources, memory)
            assert not isinstance(order, Load)
            orders.put(order)

    threading.Thread(target=listen, daemon=True).start()
    _run(end, orders, step_s)


def _run(end: EngineEnd, orders: queue.SimpleQueue[Add | Abort], step_s: float) -> None:
    running: dict[str, _Answer] = {}
    beat_s = next_s = time.monotonic()
    while True:
        next_s = max(next_s + step_s, time.monotonic())
        time.sleep(max(0.0, next_s - time.monotonic()))
        while not orders.empty():
            order = orders.get()
            if isinstance(order, Add):
                running |= {request.request_id: _Answer(request) for request in order.requests}
            else:
                running.pop(order.request_id, None)
        messages: list[FromEngine] = []
        if running:
            updates = [answer.step() for answer in running.values()]
            messages.append(News(updates))
            for update in updates:
                if update.finish_reason is not None:
                    del running[update.request_id]
        if time.monotonic() >= beat_s:
            beat_s += _BEAT_S
            messages.append(Beat(None, {}, {}))
        for message in messages:
            end.send(msgspec.msgpack.encode(message))


def _facts(config: EngineConfig) -> EngineFacts:
    values = find_model(config.model.model, weights=False).config
    width, positions = values["hidden_size"], values["max_position_embeddings"]
    spec = ModelSpec(
        architecture=values["architectures"][0],
        vocab_size=values["vocab_size"],
        hidden_size=width,
        feature_width=width,
        max_position=positions,
        layers=(),
    )
    return EngineFacts(spec, positions, _NUM_SEQS, MemoryPlan(0, 0, 0, 0, 0, 1, 16), "none", "bfloat16")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    child.BOOTSTRAP = _BOOTSTRAP.format(step_s=float(sys.argv[1]) / 1e3)
    sys.exit(main(sys.argv[2:]))
