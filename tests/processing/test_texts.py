import sys
import threading
import time
from typing import Any

import pytest

from opsin.errors import ContextLengthError, RequestError
from opsin.params import SamplingParams
from opsin.processing.processor import InputProcessor

TOO_DEEP = 900 if sys.version_info < (3, 12) else 20_000  # later Pythons count the levels of C by themselves


def process(processor: InputProcessor, prompt: str, **params: Any) -> None:
    processor.process("r", processor.prompts.read(prompt), SamplingParams(**params))


@pytest.mark.parametrize("params", [{}, {"truncate_prompt_tokens": 4}], ids=["white", "cut"])
def test_text_that_costs_too_much_to_read_is_refused_whatever_is_in_it(
    processor: InputProcessor, params: dict[str, Any]
) -> None:
    start_s = time.monotonic()
    with pytest.raises(ContextLengthError, match="characters"):
        process(processor, " " * 20_000_000, **params)
    with pytest.raises(ContextLengthError, match="characters"):
        processor.prompts.render_chat([{"role": "user", "content": [{"type": "text", "text": "<s>" * 5_000_000}]}])
    with pytest.raises(ContextLengthError, match="characters"):
        processor.tokenize("a " * 10_000_000)
    assert time.monotonic() - start_s < 2


def test_text_that_is_cut_to_fit_may_be_longer_than_the_context(processor: InputProcessor) -> None:
    process(processor, "word " * 5_000, truncate_prompt_tokens=4)


def test_other_threads_run_while_a_text_is_tokenised(processor: InputProcessor) -> None:
    text = "a bc " * 60_000
    reader = threading.Thread(target=lambda: processor.tokenizer.encode(text))
    looks = 0
    reader.start()
    while reader.is_alive():
        time.sleep(0.001)
        looks += 1
    assert looks > 10


def test_arguments_of_a_call_that_are_nested_too_deeply_are_refused(processor: InputProcessor) -> None:
    for depth in (TOO_DEEP, 100_000):
        arguments = "[" * depth + "]" * depth
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
        with pytest.raises(RequestError):
            processor.prompts.render_chat(messages)


def test_template_arguments_that_are_nested_too_deeply_are_refused(processor: InputProcessor) -> None:
    nested: dict[str, Any] = {"a": 1}
    for _ in range(TOO_DEEP):
        nested = {"a": nested}
    with pytest.raises(RequestError, match="nested too deeply"):
        processor.prompts.render_chat([{"role": "user", "content": "x"}], chat_template_kwargs=nested)


@pytest.mark.parametrize("priority", [2**63, -(2**63) - 1])
def test_priority_that_no_engine_process_could_be_told_is_refused(processor: InputProcessor, priority: int) -> None:
    with pytest.raises(RequestError) as caught:
        processor.process("r", processor.prompts.read("x"), SamplingParams(), priority=priority)
    assert caught.value.param == "priority"
