"""Grammars from afar: the same verdicts as here, and an end to those that take too long."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from opsin import RequestError
from opsin.models.hub import find_model
from opsin.params import StructuredOutputsParams
from opsin.processing import grammar_prober
from opsin.processing.grammar_prober import GrammarProber
from opsin.processing.tokenizer import Tokenizer

ENDLESS = {"allOf": [{"type": "string", "pattern": f"[a-z]{{{i}}}[^{chr(97 + i % 26)}]+$"} for i in range(30)]}
"""Takes minutes; llguidance does not count what it does here."""


@pytest.fixture
def prober(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrammarProber]:
    monkeypatch.setattr(grammar_prober, "MAX_CPU_S", 0.5)
    tokenizer = Tokenizer.from_folder(find_model("demo", weights=False).folder)
    prober = GrammarProber(tokenizer.to_json(), 1031, tokenizer.eos_token_ids)
    yield prober
    prober.close()


def test_prober_says_what_compiling_says(prober: GrammarProber):
    fine = StructuredOutputsParams(choice=["yes", "no"])
    assert not prober.is_known(fine)
    prober.check(fine)
    assert prober.is_known(fine)
    for _ in range(2):  # the second time from memory
        with pytest.raises(RequestError, match="not usable") as caught:
            prober.check(StructuredOutputsParams(regex="((("))
        assert caught.value.param == "structured_outputs"
    prober.check(fine)


def test_prober_ends_what_takes_too_long_and_goes_on(prober: GrammarProber):
    endless = StructuredOutputsParams(json=ENDLESS)
    with pytest.raises(RequestError, match="longer than"):
        prober.check(endless)
    assert prober.is_known(endless)
    prober.check(StructuredOutputsParams(regex="[0-9]{3}"))


def test_prober_busy_with_one_grammar_answers_for_others(prober: GrammarProber, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar_prober, "MAX_CPU_S", 600.0)
    monkeypatch.setattr(grammar_prober, "_MAX_WALL_S", 600.0)
    others = [StructuredOutputsParams(choice=[f"answer {i}"]) for i in range(3)]
    prober.check(others[0])

    def hang() -> None:
        with pytest.raises(RequestError):
            prober.check(StructuredOutputsParams(json=ENDLESS))

    thread = threading.Thread(target=hang)
    taken = prober._idle[-1]
    thread.start()
    while prober._idle:
        thread.join(0.001)
    for other in others[1:]:
        prober.check(other)
    assert thread.is_alive()
    taken.process.kill()
    thread.join(30)
    assert not thread.is_alive()


def test_prober_that_is_closed_leaves_no_process(prober: GrammarProber):
    prober.check(StructuredOutputsParams(choice=["a"]))
    process = prober._idle[0].process
    prober.close()
    assert process.poll() is not None
