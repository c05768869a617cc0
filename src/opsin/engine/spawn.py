"""The wiring of a front whose engine is a process of its own; ``build`` has that of one in a single process."""

from __future__ import annotations

import threading

from opsin.config import EngineConfig
from opsin.engine.checkpoint import Checkpoint, find
from opsin.engine.child import ChildProcess
from opsin.engine.front import Front
from opsin.engine.remote import RemoteEngine, Watch
from opsin.processing.grammar_prober import GrammarProber
from opsin.processing.output import OutputProcessor


def spawn_front(
    config: EngineConfig, watch: Watch, is_unwanted: threading.Event, child: ChildProcess | None = None
) -> Front:
    """Start the engine process, unless it is given, and open the tokenizer beside it.

    Raises:
        ConfigError, UnsupportedModelError, WeightError: what is wrong, and what to do.
        EngineDeadError: the process ended while it loaded the model, or nobody wants it any more.
    """
    find(config.model)  # downloads, with its progress bars; and says at once what is not supported
    engine = RemoteEngine(config, watch, child)
    try:
        checkpoint = Checkpoint.open(config)
        engine.wait_until_loaded(is_unwanted)
        tokenizer = checkpoint.tokenizer
        grammars = GrammarProber(tokenizer.to_json(), engine.facts.spec.vocab_size, tokenizer.eos_token_ids)
        inputs = checkpoint.processor(config, engine.facts, grammars)
    except BaseException:
        engine.close()
        raise
    return Front(engine, inputs, OutputProcessor(checkpoint.tokenizer), config.media, config.model.runner)
