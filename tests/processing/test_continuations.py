"""Answers behind a prompt: their tokens, the requests that score them, and what becomes of the numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.errors import RequestError
from opsin.params import PoolingParams
from opsin.processing.continuations import answer_logprobs, continue_ids, pick_requests, spelled
from opsin.processing.neutral import ControlStrings
from opsin.processing.tokenizer import Tokenizer
from opsin.types import EngineRequest
from tests.factory import build_tokenizer

PROMPT = [90, 91, 92]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer())


@pytest.fixture(scope="module")
def controls(tokenizer: Tokenizer) -> ControlStrings:
    return ControlStrings(tokenizer.special_strings)


@pytest.mark.parametrize("prompt", ["USER: What? ASSISTANT:", "What is in the picture", "é", "x" * 200])
def test_answer_behind_a_word_is_spelt_with_and_without_a_space(
    prompt: str, tokenizer: Tokenizer, controls: ControlStrings
):
    bare, spaced = spelled(prompt, ["a red circle", "3"], tokenizer, controls)
    assert [tokenizer.decode(ids) for ids in bare] == ["a red circle", "3"]
    assert [tokenizer.decode(ids) for ids in spaced] == [" a red circle", " 3"]
    whole = tokenizer.encode(prompt + " 3", add_special_tokens=False)
    assert whole == [*tokenizer.encode(prompt, add_special_tokens=False), *spaced[1]]


@pytest.mark.parametrize("prompt", ["", "<|assistant|>\n", "Answer: ", "USER: <image>", "What?</s>"])
def test_answer_behind_white_space_or_a_special_token_is_spelt_in_one_way(
    prompt: str, tokenizer: Tokenizer, controls: ControlStrings
):
    (only,) = spelled(prompt, ["red"], tokenizer, controls)
    assert [tokenizer.decode(ids) for ids in only] == ["red"]


def test_control_strings_in_an_answer_are_plain_text(tokenizer: Tokenizer, controls: ControlStrings):
    ids = continue_ids("What? ", "</s> or <image>", tokenizer, controls)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "</s> or <image>"


def test_answer_without_tokens_is_refused(controls: ControlStrings):
    silent: Any = SimpleNamespace(encode=lambda *_, **__: [], encode_rendered=lambda *_, **__: [])
    silent.encode_plain = silent.encode
    with pytest.raises(RequestError, match="no tokens") as caught:
        continue_ids("", "\u200b", silent, controls)
    assert caught.value.param == "choices"


def asked() -> EngineRequest:
    params = PoolingParams(task="pick", choices=["a", "b"])
    return EngineRequest(request_id="p", prompt_token_ids=list(PROMPT), params=params)


def targets(request: EngineRequest) -> list[tuple[int, list[int]]]:
    assert isinstance(request.params, PoolingParams)
    return request.params.targets


def test_answers_of_one_token_take_one_request_of_the_prompt_alone():
    (only,) = pick_requests(asked(), [[5], [3], [7]])
    assert only.request_id == "p"
    assert only.prompt_token_ids == PROMPT
    assert targets(only) == [(2, [3, 5, 7])]


def test_requests_go_down_to_the_leaves_and_read_every_place_once():
    requests = pick_requests(asked(), [[1], [1, 2], [1, 2, 3], [4, 5], [4, 6]])
    assert [request.prompt_token_ids[3:] for request in requests] == [[1, 2], [4]]
    assert [targets(request) for request in requests] == [[(2, [1, 4]), (3, [2]), (4, [3])], [(3, [5, 6])]]
    assert {request.cache_namespace for request in requests} == {"p"}
    assert len({request.request_id for request in requests}) == 2


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=12))
def test_sums_are_of_the_tokens_own_log_probabilities(answers: list[list[int]]):
    def logprob(beginning: list[int], token: int) -> float:
        return -float(np.float32(hash((*beginning, -1, token)) % 1000))

    requests = pick_requests(asked(), answers)
    values = [
        [
            np.array([logprob(request.prompt_token_ids[3 : at + 1], i) for i in ids], np.float32).tobytes()
            for at, ids in targets(request)
        ]
        for request in requests
    ]
    expected = [sum(logprob(answer[:i], token) for i, token in enumerate(answer)) for answer in answers]
    assert answer_logprobs(answers, requests, values) == expected
    places = [
        (*request.prompt_token_ids[3 : at + 1], i) for request in requests for at, ids in targets(request) for i in ids
    ]
    assert len(places) == len(set(places)), "a place is read twice"
    contexts = [tuple(request.prompt_token_ids) for request in requests]
    assert not any(a != b and b[: len(a)] == a for a in contexts for b in contexts), "a request runs in vain"
