import pytest
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from opsin.processing.detokenizer import Detokenizer
from opsin.processing.tokenizer import Tokenizer
from tests.processing import vocabularies


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_long_text_is_tokenised_as_transformers_does(kind: str) -> None:
    text = "The quick brown fox, 2 <image> jumps. " * 400
    assert len(text) > 2**13
    assert vocabularies.tokenizer(kind).encode(text) == vocabularies.huggingface(kind).encode(text)


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_tokens_of_byte_level_vocabularies_alone_are_bytes(kind: str) -> None:
    tokenizer = vocabularies.tokenizer(kind)
    assert tokenizer.is_byte_level == (kind == "byte-level")
    if tokenizer.is_byte_level:
        text = "Grüße aus Köln, 你好 😀"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.token_bytes(10**6) == b""


def test_added_tokens_of_any_letters_stream_as_the_whole_decodes() -> None:
    rust = RustTokenizer.from_str(vocabularies.huggingface("byte-level").backend_tokenizer.to_str())
    rust.add_tokens(["<a b>", "é", "中é", "Ġ<c>"])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, clean_up_tokenization_spaces=False))
    ids = tokenizer.encode("x <a b> é 中é Ġ<c> y", add_special_tokens=False)
    assert {rust.token_to_id(word) for word in ("<a b>", "é", "中é", "Ġ<c>")} <= set(ids)
    detokenizer = Detokenizer(tokenizer)
    assert "".join([*map(detokenizer.add, ids), detokenizer.flush()]) == rust.decode(ids)
