"""The vision tower as a process of its own: ``main`` loads a model without its decoder, and encodes what it is sent.

It ends when the engine's end of the socket closes, whatever it is at, so it does not outlive the process that started
it.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from opsin.engine.heap import give_back
from opsin.engine.nice import be_nice
from opsin.engine.remote_tower import TowerItem, TowerLoad, TowerReply
from opsin.media.wire import map_memory, receive, send, share
from opsin.models.hub import ModelFiles
from opsin.models.load import load_model
from opsin.runner.executor import Pixels
from opsin.runner.tower import EagerTower

logger = logging.getLogger(__name__)

_TIDY_S = 10.0

_Items = queue.SimpleQueue[tuple[TowerItem, int]]


def main(descriptor: int) -> int:
    """Serve one engine until it is gone; returns the exit status.

    Args:
        descriptor: this end of the socket.
    """
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for ignored in (signal.SIGTERM, signal.SIGINT):  # the engine decides when to stop
        signal.signal(ignored, signal.SIG_IGN)
    be_nice()  # and so are the threads that this one makes
    with socket.socket(fileno=descriptor) as connection:
        try:
            load, _ = receive(connection, TowerLoad)
            logging.basicConfig(format="%(message)s", stream=sys.stderr)
            logging.getLogger("opsin").setLevel(max(load.log_level, logging.WARNING))  # the engine says the rest
            items: _Items = queue.SimpleQueue()
            threading.Thread(target=_listen, args=(connection, items), name="opsin-listen", daemon=True).start()
            return _serve(connection, load, items)
        except (EOFError, ConnectionError):  # the engine is gone
            return 0


def _serve(connection: socket.socket, load: TowerLoad, items: _Items) -> int:
    try:
        tower = _load(load)
        send(connection, TowerReply())
        tidied_s = time.monotonic()
        while True:
            item, descriptor = items.get()
            features = _encode(tower, item, descriptor)
            shared = share(features.data.cast("B"))
            try:
                send(connection, TowerReply(shape=features.shape), [shared])
            finally:
                os.close(shared)
            if time.monotonic() - tidied_s > _TIDY_S:
                give_back()
                tidied_s = time.monotonic()
    except ConnectionError:
        raise
    except Exception as error:  # nothing of it is to be trusted any more
        logger.exception("The vision tower failed.")
        send(connection, TowerReply(error=f"{type(error).__name__}: {error}"))
        return 1


def _load(load: TowerLoad) -> EagerTower:
    torch.set_num_threads(load.num_threads)
    device = torch.device("cpu")
    model = load_model(
        ModelFiles(Path(load.folder), load.config, generation_config={}, processor={}),
        load.norm,
        device=device,
        dtype=getattr(torch, load.dtype),
        max_model_len=load.max_model_len,
        load_format=load.load_format,
        quantization=load.quantization,
        seed=load.seed,
        progress=False,
        has_decoder=False,
    )
    gc.collect()
    gc.freeze()  # what a model and its libraries leave stays
    return EagerTower(model, device)


@torch.inference_mode()
def _encode(tower: EagerTower, item: TowerItem, descriptor: int) -> np.ndarray:
    try:
        memory = map_memory(descriptor, item.num_bytes)
    finally:
        os.close(descriptor)
    pixels = Pixels(np.frombuffer(memory, np.uint8))
    return tower([pixels], [item.layout]).float().contiguous().numpy()


def _listen(connection: socket.socket, items: _Items) -> None:
    """Take in what comes, whatever the other thread is at; end the process when nothing more can come."""
    try:
        while True:
            item, (descriptor,) = receive(connection, TowerItem, 1)
            items.put((item, descriptor))
    except (EOFError, ConnectionError):
        os._exit(0)
    except Exception:  # our own bug; but a process that listens no more would be waited for
        logger.exception("The vision tower does not understand its engine.")
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
