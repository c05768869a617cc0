"""Requests that wait for their grammars: in order with what aborts them, and in nobody's way."""

from __future__ import annotations

import os
import queue
import threading
from typing import Any

import pytest

from opsin.engine.grammars import GrammarThreads, Order
from opsin.engine.messages import Add
from opsin.errors import RequestError
from opsin.params import SamplingParams, StructuredOutputsParams
from opsin.types import EngineRequest

FORM = StructuredOutputsParams(regex="a")


class SlowCompiler:
    """Compiles nothing, and not before it may."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.known = False

    def is_known(self, params: StructuredOutputsParams) -> bool:
        return self.known

    def compile(self, params: StructuredOutputsParams) -> Any:
        assert self.may_end.wait(30)
        raise RequestError("The engine says so once more.")


def add(*names: str, form: StructuredOutputsParams | None = FORM) -> Add:
    params = SamplingParams(structured_outputs=form)
    return Add([EngineRequest(request_id=name, prompt_token_ids=[1], params=params) for name in names], [])


@pytest.fixture
def compiler() -> SlowCompiler:
    return SlowCompiler()


@pytest.fixture
def passed() -> queue.SimpleQueue[Order]:
    return queue.SimpleQueue()


@pytest.fixture
def threads(compiler: SlowCompiler, passed: queue.SimpleQueue[Order]) -> GrammarThreads:
    return GrammarThreads(compiler, passed.put)  # type: ignore[arg-type]


def test_request_without_a_grammar_overtakes_those_that_wait_for_theirs(
    threads: GrammarThreads, compiler: SlowCompiler, passed: queue.SimpleQueue[Order]
):
    slow, free = add("slow"), add("free", form=None)
    threads.take((slow, None))
    threads.take((free, None))
    assert passed.get(timeout=10)[0] is free
    assert passed.empty()
    compiler.known = True
    known = add("known")
    threads.take((known, None))
    assert passed.get(timeout=10)[0] is known
    compiler.may_end.set()
    assert passed.get(timeout=10)[0].requests == slow.requests


def test_request_aborted_while_its_grammar_is_compiled_is_forgotten(
    threads: GrammarThreads, compiler: SlowCompiler, passed: queue.SimpleQueue[Order]
):
    ours, theirs = os.pipe()
    threads.take((add("a", "b"), None))
    threads.take((add("c"), theirs))
    assert threads.abort("a")
    assert threads.abort("c")
    assert not threads.abort("a")
    compiler.may_end.set()
    assert [request.request_id for request in passed.get(timeout=10)[0].requests] == ["b"]
    assert os.read(ours, 1) == b""  # the other end was closed
    os.close(ours)
    assert not threads.abort("b")  # the engine's to abort
    assert passed.empty()
