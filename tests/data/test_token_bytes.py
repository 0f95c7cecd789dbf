"""The bytes of tokens, joined, are the text that they stand for, in every kind of tokenizer."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import as_bytes, kinds

from jaxformer.data.foreign import from_files
from jaxformer.data.token_bytes import token_bytes
from jaxformer.data.tokenizer import (
    ByteTokenizer,
    SymbolTokenizer,
    Tokenizer,
    train_sentencepiece,
)
from jaxformer.errors import ConfigError

KINDS = kinds()
OWN = ("byte", "character", "word", "sentencepiece")
REFUSED = {"bert": "cleans up spaces", "bert-cased": "does more than to join"}


@cache
def tokenizer(kind: str) -> Tokenizer:
    match kind:
        case "byte":
            return ByteTokenizer()
        case "character":
            return SymbolTokenizer(tuple("abé日 "), "")
        case "word":
            return SymbolTokenizer(("a", "bé", "日"), " ")
        case "sentencepiece":
            return train_sentencepiece(["hello world, a bee", "été à la mer, hello"] * 20, 290)
    files = {n: as_bytes(c) for n, c in KINDS[kind].items() if n != "config.json"}
    return from_files(files, KINDS[kind]["config.json"], {})


@pytest.mark.parametrize("kind, why", REFUSED.items())
def test_texts_that_are_not_joined_bytes_are_refused(kind, why):
    with pytest.raises(ConfigError, match=why):
        token_bytes(tokenizer(kind))


@pytest.mark.parametrize("kind", [*OWN, *(kind for kind in KINDS if kind not in REFUSED)])
def test_joined_they_are_what_decoding_writes(kind):
    made = tokenizer(kind)
    first, later = token_bytes(made)
    assert len(first) == len(later) == made.vocab_size
    begins = [i for i, token in enumerate(first) if token is not None]
    goes_on = [i for i, token in enumerate(later) if token is not None]
    assert not {*begins, *goes_on} & {*made.stop_ids, *made.special_ids}

    @given(st.sampled_from(begins), st.lists(st.sampled_from(goes_on), max_size=5))
    @settings(max_examples=150, deadline=None)
    def check(begin, others):
        data = (first[begin] or b"") + b"".join(later[i] or b"" for i in others)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return
        assert made.decode([begin, *others]) == text

    check()


def test_characters_are_split_over_tokens():
    later = token_bytes(tokenizer("sentencepiece")).later
    assert sum(token is not None and len(token) == 1 for token in later) >= 256
