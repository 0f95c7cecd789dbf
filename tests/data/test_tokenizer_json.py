"""Tokenizers trained here, as other libraries and our own reader of foreign ones have them."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import AWKWARD, CORPUS

from jaxformer.data.foreign import from_files
from jaxformer.data.tokenizer import (
    ByteTokenizer,
    SymbolTokenizer,
    Tokenizer,
    train_sentencepiece,
)
from jaxformer.data.tokenizer_json import tokenizer_json

KINDS = {
    "pieces": train_sentencepiece(CORPUS.split("\n") * 3, 500),
    "bytes": ByteTokenizer(),
    "letters": SymbolTokenizer(tuple(sorted(set(CORPUS))), ""),
    "words": SymbolTokenizer(tuple(sorted(set(CORPUS.split()))), " "),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def foreign(tokenizer: Tokenizer, model_type: str) -> Tokenizer:
    config = {"model_type": model_type, "is_encoder_decoder": model_type == "t5"}
    return from_files(tokenizer_json(tokenizer, encoder=model_type != "llama"), config, {})


def assert_same(ours: Tokenizer, text: str) -> None:
    theirs = foreign(ours, "t5"), foreign(ours, "llama"), foreign(ours, "bert")
    for other in theirs:
        assert other.encode(text) == ours.encode(text)
        assert other.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert theirs[0].source(text) == theirs[2].source(text) == ours.source(text)
    assert theirs[0].target(text) == theirs[1].target(text) == ours.target(text)
    assert theirs[1].prompt(text) == ours.prompt(text)


@kinds
def test_texts_are_the_same_ids_and_back(kind: str):
    for text in [*AWKWARD, *CORPUS.split("\n"), CORPUS]:
        assert_same(KINDS[kind], text)


@kinds
@given(text=st.text(st.sampled_from(sorted(set(CORPUS)) + ["é", "\u0301", "🙂"]), max_size=20))
def test_any_text_is_the_same_ids_and_back(kind: str, text: str):
    assert_same(KINDS[kind], text)


@kinds
def test_special_ids_are_the_same(kind: str):
    ours = KINDS[kind]
    for model_type in ("t5", "llama", "bert"):
        other = foreign(ours, model_type)
        for name in ("vocab_size", "pad_id", "eos_id", "unk_id", "mask_id", "start_id",
                     "stop_ids", "special_ids"):  # fmt: skip
            if (name, model_type) != ("start_id", "bert"):  # which starts nothing
                assert getattr(other, name) == getattr(ours, name), name
        assert pickle.loads(pickle.dumps(other)) == other


@kinds
def test_masks_are_read_in_their_place(kind: str):
    ours, theirs = KINDS[kind], foreign(KINDS[kind], "bert")
    for text in ("the <mask> sat", "<mask>", "a <mask> <mask> b", "the cat <mask>"):
        assert theirs.masked(text) == ours.masked(text)
        assert theirs.masked(text).count(ours.mask_id) == text.count("<mask>")


def test_a_symbol_that_looks_special_is_not_written():
    assert tokenizer_json(SymbolTokenizer(("a", "<pad>"), " "), encoder=True) == {}
