from typing import Any

import pytest

from opsin.errors import RequestError
from opsin.params import PoolingParams, SamplingParams, StructuredOutputsParams


@pytest.mark.parametrize("name", ["top_k", "max_tokens", "min_tokens", "truncate_prompt_tokens"])
def test_whole_number_of_more_than_64_bits_is_refused(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{"max_tokens": None, name: 2**63})
    assert caught.value.param == name


def test_dimensions_that_no_vector_has_are_refused() -> None:
    with pytest.raises(RequestError):
        PoolingParams(dimensions=2**70)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_words_that_take_long_to_read_are_refused_in_a_short_message(name: str) -> None:
    words: Any = ["word " * 20_000]
    with pytest.raises(RequestError, match="65536 characters together") as caught:
        SamplingParams(**{name: words})
    assert len(str(caught.value)) < 400


def test_message_about_a_large_value_does_not_repeat_it() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(logit_bias=dict.fromkeys(range(10_000), 1.0))
    assert len(str(caught.value)) < 400


def test_schema_that_is_nested_too_deeply_for_json_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(json=schema)
    assert caught.value.param == "structured_outputs"
    while schema:  # taken apart from outside: dropping it whole would be as deep
        schema = schema.get("items", {})
