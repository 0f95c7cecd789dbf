"""Text survives each tokenizer, and a saved tokenizer is the one that was saved."""

import hashlib
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.config import DataConfig
from jaxformer.data import tokenizer as tokenizers
from jaxformer.data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    SymbolTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from jaxformer.errors import DataError

TEXTS = ["the cat sat on the mat.", "The dog  sat\non the log!", "é ü ß, and so on and so on"]
PIECES = train_tokenizer(DataConfig(vocab_size=320), TEXTS * 3)
CHARS = train_tokenizer(DataConfig(tokenizer="char"), TEXTS)
WORDS = train_tokenizer(DataConfig(tokenizer="word"), TEXTS)
ALL = pytest.mark.parametrize(
    "tokenizer", [PIECES, CHARS, WORDS, ByteTokenizer()], ids=["pieces", "chars", "words", "bytes"]
)
# SentencePiece writes spaces as U+2581, so that character alone comes back as a space.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@given(any_text)
def test_bytes_give_back_any_text(text: str):
    ids = ByteTokenizer().encode(text)
    assert ByteTokenizer().decode(ids) == text
    assert len(ids) == len(text.encode())


@given(any_text)
def test_pieces_give_back_any_text(text: str):
    assert PIECES.decode(PIECES.encode(text)) == text


@given(st.text(st.sampled_from(sorted(set("".join(TEXTS))))))
def test_characters_give_back_known_text(text: str):
    assert CHARS.decode(CHARS.encode(text)) == text
    assert len(CHARS.encode(text)) == len(text)


@given(st.lists(st.sampled_from(sorted({w for t in TEXTS for w in t.split()}))))
def test_words_give_back_known_words(words: list[str]):
    assert WORDS.decode(WORDS.encode("  ".join(words))) == " ".join(words)
    assert len(WORDS.encode(" ".join(words))) == len(words)


def test_unknown_symbols_are_unk():
    assert CHARS.encode("t☃t")[1] == CHARS.unk_id
    assert WORDS.encode("the snowman") == [WORDS.encode("the")[0], WORDS.unk_id]
    assert CHARS.decode(CHARS.encode("t☃t")) == "tt"


@ALL
def test_special_ids(tokenizer):
    special = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id)
    assert special == (0, 1, 2, 3)
    assert tokenizer.start_id == tokenizer.pad_id
    ids = tokenizer.encode("the <mask> </s> cat")
    assert all(i == tokenizer.unk_id or 4 <= i < tokenizer.vocab_size for i in ids)


@ALL
def test_decode_stops_at_eos_and_passes_over_what_is_no_text(tokenizer):
    ids = tokenizer.encode("the cat")
    noise = [0, 2, 3, -1, tokenizer.vocab_size, 10**9]
    assert tokenizer.decode([*noise, *ids, *noise, 1, *ids]) == tokenizer.decode(ids) != ""
    assert tokenizer.decode([1]) == tokenizer.decode([]) == ""


@ALL
def test_save_load_and_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a" / "b")
    for same in (load_tokenizer(tmp_path / "a" / "b"), pickle.loads(pickle.dumps(tokenizer))):
        assert same == tokenizer
        assert same.hash == tokenizer.hash
        assert same.vocab_size == tokenizer.vocab_size
        assert same.encode("the cat ☃") == tokenizer.encode("the cat ☃")
    written = sorted((tmp_path / "a" / "b").iterdir())
    content = b"".join(path.read_bytes() for path in written)
    assert tokenizer.hash == hashlib.sha256(content).hexdigest()


def test_hash_changes_with_content():
    tokenizer = SymbolTokenizer(("a", "b"), "")
    others = [
        SymbolTokenizer(("b", "a"), ""),
        SymbolTokenizer(("a", "b"), " "),
        SymbolTokenizer(("a", "b", "c"), ""),
        ByteTokenizer(),
        PIECES,
        train_tokenizer(DataConfig(vocab_size=300), TEXTS),
    ]
    assert len({t.hash for t in [tokenizer, *others]}) == 7
    assert tokenizer.hash == SymbolTokenizer(("a", "b"), "").hash


def test_pieces_train_the_same_twice_and_silently(capfd):
    again = train_tokenizer(DataConfig(vocab_size=320), iter(TEXTS * 3))
    assert again.hash == PIECES.hash
    assert capfd.readouterr() == ("", "")


def test_pieces_learn_from_long_lines():
    long = train_tokenizer(DataConfig(vocab_size=320), ["abcde " * 1000 + "vwxyz " * 1000])
    assert len(long.encode("abcde vwxyz")) <= 4


@pytest.mark.parametrize("kind", ["char", "word", "sentencepiece"])
@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_an_error(kind, texts):
    with pytest.raises(DataError):
        train_tokenizer(DataConfig(tokenizer=kind), texts)


def test_too_small_a_vocabulary_is_an_error():
    with pytest.raises(DataError, match="data.vocab_size"):
        train_tokenizer(DataConfig(vocab_size=100), TEXTS)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        "[]",
        "{}",
        '{"type": "pickle"}',
        '{"type": "byte", "extra": 1}',
        '{"type": "symbols", "symbols": [], "separator": ""}',
        '{"type": "symbols", "symbols": ["a", "a"], "separator": ""}',
        '{"type": "symbols", "symbols": ["ab"], "separator": ""}',
        '{"type": "symbols", "symbols": ["a b"], "separator": " "}',
        '{"type": "symbols", "symbols": [""], "separator": " "}',
        '{"type": "symbols", "symbols": [1], "separator": ""}',
        '{"type": "symbols", "symbols": ["a"], "separator": ","}',
        '{"type": "symbols", "symbols": ["a"]}',
    ],
)
def test_malformed_settings_are_refused_by_name(content, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(content)
    with pytest.raises(DataError, match="settings.json"):
        load_tokenizer(tmp_path)


def test_missing_and_oversized_files_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="settings.json"):
        load_tokenizer(tmp_path)
    PIECES.save(tmp_path)
    monkeypatch.setattr(tokenizers, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"tokenizer\.model.*too much"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(DataError, match="tokenizer.model"):
        load_tokenizer(str(tmp_path))


def test_foreign_and_broken_models_are_refused(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=40, minloglevel=3,
        hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(DataError, match="must be 0, 1, 2"):
        SentencePieceTokenizer(model.getvalue())
    (tmp_path / "settings.json").write_text(json.dumps({"type": "sentencepiece"}))
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(DataError, match="tokenizer.model.*not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_import_loads_nothing_heavy():
    heavy = "('jax', 'tensorflow', 'grain', 'sentencepiece', 'tensorflow_datasets')"
    code = f"import sys, jaxformer.data.pipeline; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
