"""Grammars: which tokens they allow, when an answer is complete, and which constraints are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opsin import RequestError, SamplingParams
from opsin.models.hub import find_model
from opsin.params import StructuredOutputsParams, Thinking
from opsin.processing.grammar import Grammar, GrammarBehindThinking, GrammarCompiler
from opsin.processing.tokenizer import Tokenizer

VOCAB_SIZE = 1024


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(find_model("demo", weights=False).folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB_SIZE + 7)


def allowed(grammar: Grammar | GrammarBehindThinking) -> set[int]:
    assert grammar.mask is not None
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(grammar.mask, np.uint8), bitorder="little")).tolist())


def feed(grammar: Grammar | GrammarBehindThinking, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode_plain(text):
        assert token in allowed(grammar)
        assert grammar.accept(token)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"choice": ["red circle", "blue"]}, "red circle"),
        ({"choice": ['say "hi"', "a\\b"]}, 'say "hi"'),
        ({"regex": "[0-9]{3}-x"}, "123-x"),
        ({"grammar": 'root ::= "a" ("b" | "c")'}, "ac"),
        ({"grammar": 'start: "a" ("b" | "c")'}, "ab"),
        ({"json": {"type": "object", "properties": {"n": {"const": 4}}, "required": ["n"]}}, '{"n": 4}'),
        ({"json": '{"const": "yes"}'}, '"yes"'),
        ({"json_object": True}, '{"colour": ["red", 1]}'),
        ({"json_object": True, "disable_any_whitespace": True}, '{"a":1}'),
    ],
)
def test_grammar_text_that_fits_is_allowed_to_its_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer, params: dict[str, Any], text: str
):
    grammar = compiler.compile(StructuredOutputsParams(**params))
    feed(grammar, tokenizer, text)
    assert grammar.mask is None


def test_grammar_answer_that_may_go_on_allows_every_end_token(compiler: GrammarCompiler, tokenizer: Tokenizer):
    grammar = compiler.compile(StructuredOutputsParams(regex="(ab)+"))
    assert not allowed(grammar) & tokenizer.eos_token_ids
    feed(grammar, tokenizer, "ab")
    assert tokenizer.eos_token_ids <= allowed(grammar)


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"properties": {"a": {"const": 1}}}, '{"a": 1, "b": 2}', False),
        ({"properties": {"a": {"const": 1}}, "additionalProperties": True}, '{"a": 1, "b": 2}', True),
        ({"items": {"properties": {"a": {"const": 1}}}}, '[{"b": 2}]', False),
        ({"properties": {"properties": {"const": 1}}}, '{"properties": 1}', True),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": {"const": 1}}}}}, '{"b": 2}', False),
        (
            {"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]},
            '{"a": 1, "b": 2}',
            True,
        ),
    ],
)
def test_grammar_objects_take_only_the_properties_that_they_list(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], text: str, fits: bool
):
    grammar = compiler.compile(
        StructuredOutputsParams(json={"type": "array" if text[0] == "[" else "object", **schema})
    )
    ids = tokenizer.encode_plain(text)
    assert all(grammar.accept(token) for token in ids) is fits


def test_grammar_takes_as_many_choices_as_their_characters_allow(compiler: GrammarCompiler, tokenizer: Tokenizer):
    choices = [f"{i:07}" for i in range(18_000)]
    feed(compiler.compile(StructuredOutputsParams(choice=choices)), tokenizer, choices[-1])


def test_grammar_that_grows_too_large_says_so(compiler: GrammarCompiler, tokenizer: Tokenizer):
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    grammar = compiler.compile(StructuredOutputsParams(json=schema))
    assert not grammar.accept(tokenizer.encode_plain("{")[0])
    assert grammar.error is not None
    assert "cannot be followed any further" in grammar.error


def test_grammar_of_a_schema_that_is_true_takes_any_json(compiler: GrammarCompiler, tokenizer: Tokenizer):
    assert compiler.compile(StructuredOutputsParams(json="true")).accept(tokenizer.encode_plain("[")[0])


def test_grammar_token_outside_is_not_accepted(compiler: GrammarCompiler, tokenizer: Tokenizer):
    grammar = compiler.compile(StructuredOutputsParams(choice=["yes", "no"]))
    assert not grammar.accept(tokenizer.encode_plain("7")[0])
    assert grammar.error is not None


def test_grammar_mask_covers_logits_wider_than_the_vocabulary_and_allows_none_there(compiler: GrammarCompiler):
    grammar = compiler.compile(StructuredOutputsParams(regex="[^x]+"))
    assert grammar.mask is not None
    assert len(grammar.mask) * 8 >= VOCAB_SIZE + 7
    assert max(allowed(grammar)) < VOCAB_SIZE


def test_grammar_compiled_twice_starts_afresh(compiler: GrammarCompiler, tokenizer: Tokenizer):
    params = StructuredOutputsParams(choice=["yes", "no"])
    feed(compiler.compile(params), tokenizer, "yes")
    feed(compiler.compile(params), tokenizer, "no")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json": "not json"}, "not a JSON schema"),
        ({"json": "[" * 100_000}, "not a JSON schema"),
        ({"json": "false"}, "not a JSON schema"),
        ({"json": '{"items":' * 200 + "{}" + "}" * 200}, "not a JSON schema"),
        ({"json": {"type": "objekt"}}, "objekt"),
        ({"json": {"$ref": "http://example.org/schema"}}, "not usable"),
        ({"regex": "((("}, r"not usable: .*\(\(\(.*: unclosed group\.$"),
        ({"regex": ""}, "regex that is not"),
        ({"grammar": "start: nowhere"}, "not usable"),
    ],
)
def test_compile_malformed_constraint_is_refused(compiler: GrammarCompiler, params: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message) as caught:
        compiler.compile(StructuredOutputsParams(**params))
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
        ({"choice": []}, "non-empty list"),
        ({"choice": ["a", ""]}, "non-empty strings"),
        ({"choice": ["a" * 2**18]}, "characters together"),
        ({"schema": "{}"}, "schema"),
    ],
)
def test_params_constraint_that_says_nothing_clear_is_refused(params: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        SamplingParams(structured_outputs=params)  # pyright: ignore[reportArgumentType]


def test_params_min_tokens_with_a_constraint_is_refused():
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), min_tokens=2)


def behind(compiler: GrammarCompiler, **thinking: Any) -> GrammarBehindThinking:
    grammar = compiler.compile(StructuredOutputsParams(choice=["yes", "no"], thinking=Thinking(**thinking)))
    assert isinstance(grammar, GrammarBehindThinking)
    return grammar


def test_grammar_behind_open_thoughts_allows_all_until_they_close(compiler: GrammarCompiler, tokenizer: Tokenizer):
    grammar = behind(compiler, opens=900, closes=901, is_open=True)
    plain = compiler.compile(StructuredOutputsParams(choice=["yes", "no"]))
    for token in (5, 900, *tokenizer.encode_plain("yes"), 7):
        assert grammar.mask is None
        assert not grammar.is_complete
        assert grammar.accept(token)
    assert grammar.accept(901)
    assert grammar.mask == plain.mask
    for token in tokenizer.encode_plain("no"):
        assert token in allowed(grammar)
        assert not grammar.is_complete
        assert grammar.accept(token)
    assert grammar.is_complete


def test_grammar_behind_thoughts_not_begun_allows_their_beginning_or_the_answer(
    compiler: GrammarCompiler, tokenizer: Tokenizer
):
    plain = compiler.compile(StructuredOutputsParams(choice=["yes", "no"]))
    assert isinstance(plain, Grammar)
    assert allowed(behind(compiler, opens=900, closes=901)) == allowed(plain) | {900}
    thinks, answers, breaks = (behind(compiler, opens=900, closes=901) for _ in range(3))
    assert thinks.accept(900)
    assert thinks.mask is None
    first, *rest = tokenizer.encode_plain("yes")
    assert answers.accept(first)
    assert 900 not in allowed(answers) if rest else answers.is_complete
    assert not breaks.accept(tokenizer.encode_plain("7")[0])
    assert breaks.error is not None


def test_grammar_behind_thoughts_is_compiled_once_with_and_without_them(compiler: GrammarCompiler):
    compiler.compile(StructuredOutputsParams(regex="[a-f]{7}"))
    assert compiler.is_known(StructuredOutputsParams(regex="[a-f]{7}", thinking=Thinking(opens=1, closes=2)))
    assert not compiler.is_known(StructuredOutputsParams(regex="[a-g]{7}", thinking=Thinking(opens=1, closes=2)))
