"""What the model reads and learns, as ids."""

import numpy as np
import pytest

from jaxformer.config import DataConfig
from jaxformer.data.sources import Example
from jaxformer.data.tasks import encode_source, encode_target, source_text, texts, tokenise
from jaxformer.data.tokenizer import ByteTokenizer, SymbolTokenizer

BYTES = ByteTokenizer()
PAIRS = [Example("A b", ("x", "yy")), Example("", ("",)), Example("cd", ("zzz",))]
PAIRED = DataConfig(task="seq2seq")


def unpack(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "Ab c"),
        ({"prefix": "say: "}, "say: Ab c"),
        ({"spell": True}, "a b   c"),
        ({"spell": True, "prefix": "Say: "}, "Say: a b   c"),
    ],
)
def test_source_text(options, expected):
    assert source_text(DataConfig(task="seq2seq", **options), "Ab c") == expected


def test_both_sides_end_with_eos():
    config = DataConfig(task="seq2seq", prefix="p", spell=True)
    for ids, text in [
        (encode_source(config, BYTES, "Ab"), "pa b"),
        (encode_target(config, BYTES, "Ab"), "Ab"),
    ]:
        assert ids.dtype == np.int32
        assert ids.tolist() == [*BYTES.encode(text), BYTES.eos_id]


@pytest.mark.parametrize("task", ["lm", "mlm"])
def test_texts_alone_are_targets(task):
    rows = tokenise(DataConfig(task=task, prefix="no"), BYTES, PAIRS, one_per_target=False)
    assert len(rows) == 3
    assert unpack(rows.source_ids, rows.source_offsets) == [[], [], []]
    expected = [[*BYTES.encode(text), 1] for text in ("x", "", "zzz")]
    assert unpack(rows.target_ids, rows.target_offsets) == expected
    assert rows.target_ids.dtype == np.int32


def test_one_row_for_each_target_or_only_the_first():
    every = tokenise(PAIRED, BYTES, iter(PAIRS), one_per_target=True)
    sources = [BYTES.decode(ids) for ids in unpack(every.source_ids, every.source_offsets)]
    targets = [BYTES.decode(ids) for ids in unpack(every.target_ids, every.target_offsets)]
    pairs = list(zip(sources, targets, strict=True))
    assert pairs == [("A b", "x"), ("A b", "yy"), ("", ""), ("cd", "zzz")]
    first = tokenise(PAIRED, BYTES, PAIRS, one_per_target=False)
    assert len(first) == 3
    assert BYTES.decode(first.target_ids[:2]) == "x"


def test_texts_for_a_tokenizer_leave_nothing_unknown():
    config = DataConfig(task="seq2seq", spell=True, prefix="P")
    seen = list(texts(config, PAIRS))
    assert seen == ["Pa   b", "x", "yy", "P", "", "Pc d", "zzz"]
    chars = SymbolTokenizer(tuple(sorted(set("".join(seen)))), "")
    rows = tokenise(config, chars, PAIRS, one_per_target=True)
    assert chars.unk_id not in rows.source_ids
    assert chars.unk_id not in rows.target_ids
    assert list(texts(DataConfig(), PAIRS)) == ["x", "yy", "", "zzz"]


def test_no_examples():
    rows = tokenise(PAIRED, BYTES, [], one_per_target=True)
    assert len(rows) == 0
    assert rows.source_offsets.tolist() == rows.target_offsets.tolist() == [0]
