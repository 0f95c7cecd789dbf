"""Batches hold the tokens they should, in the same order however they are asked for."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.config import DataConfig
from jaxformer.data.layout import lay_out, n_batches
from jaxformer.data.pipeline import (
    evaluation_batches,
    left_out,
    rows_per_batch,
    training_batches,
)
from jaxformer.data.sources import Example
from jaxformer.data.tasks import Rows, tokenise
from jaxformer.data.tokenizer import ByteTokenizer
from jaxformer.errors import ConfigError, DataError
from jaxformer.types import Batch, Tokens

BYTES = ByteTokenizer()
words = st.text("abc", max_size=20)


def config(task: Any, **options: Any) -> DataConfig:
    options = {"buckets": (8, 16, 24), "batch_tokens": 96, "tokenizer": "byte"} | options
    return DataConfig(task=task, **options)


def numbered(config: DataConfig, n: int, longest: int = 20) -> Rows:
    """n examples that differ from each other, of many lengths."""
    texts = [f"{i:x}" + "t" * (i * 7 % (longest - 3)) for i in range(n)]
    examples = [Example("s" * (i * 5 % longest), (text,)) for i, text in enumerate(texts)]
    return tokenise(config, BYTES, examples, one_per_target=True)


def arrays(batch: Batch) -> list[np.ndarray]:
    sides = [side for side in (batch.source, batch.target) if side is not None]
    return [*(array for side in sides for array in side), batch.labels, batch.weights]


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def segments(tokens: Tokens, values: np.ndarray) -> list[list[list[int]]]:
    """For each row, the `values` at each of its segments."""
    return [
        [row[seg == s].tolist() for s in range(1, seg.max(initial=0) + 1)]
        for row, seg in zip(values, tokens.seg, strict=True)
    ]


def texts_of(rows: Rows) -> Counter:
    """The (source, target) ids of each example, eos included."""

    def texts(ids: np.ndarray, offsets: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(ids[a:b].tolist()) for a, b in pairwise(offsets)]

    source = texts(rows.source_ids, rows.source_offsets)
    return Counter(zip(source, texts(rows.target_ids, rows.target_offsets), strict=True))


def check_shape(config: DataConfig, batch: Batch) -> None:
    """The invariants of every batch: shapes, types, and what padding looks like."""
    n = batch.labels.shape[1]
    assert n in config.buckets
    rows = rows_per_batch(config, n, 2)
    assert batch.labels.shape == (rows + rows % 2, n)
    for array in arrays(batch):
        assert array.shape == batch.labels.shape
        assert array.dtype == (np.float32 if array is batch.weights else np.int32)
    assert not batch.labels[batch.weights == 0].any()
    assert set(np.unique(batch.weights).tolist()) <= {0.0, 1.0}
    for side in (batch.source, batch.target):
        if side is not None:
            assert not side.ids[side.seg == 0].any() and not side.pos[side.seg == 0].any()
            for positions in (p for row in segments(side, side.pos) for p in row):
                assert positions == list(range(len(positions)))


def check_pairs(batch: Batch) -> Counter:
    """The pairs in a seq2seq batch, after checking inputs against labels."""
    source, target = batch.source, batch.target
    assert source is not None and target is not None
    assert np.array_equal(batch.weights > 0, target.seg > 0)
    found = Counter()
    sides = zip(
        segments(source, source.ids),
        segments(target, target.ids),
        segments(target, batch.labels),
        strict=True,
    )
    for row in sides:
        for read, written, labels in zip(*row, strict=True):
            assert read[-1] == labels[-1] == BYTES.eos_id
            assert written == [BYTES.start_id, *labels[:-1]]
            found[tuple(read), tuple(labels)] += 1
    return found


def per_epoch(c: DataConfig, rows: Rows, seed: int) -> int:
    """Training batches in an epoch."""
    buckets = c.buckets[-1:] if c.pack else c.buckets
    layout = lay_out(c, rows, buckets, c.pack, seed)
    return n_batches(layout.bucket, {n: rows_per_batch(c, n, 2) for n in buckets})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=50), st.booleans(), st.integers(0, 9))
def test_every_epoch_holds_each_pair(pairs, pack, seed):
    c = config("seq2seq", pack=pack)
    rows = tokenise(c, BYTES, [Example(s, (t,)) for s, t in pairs], one_per_target=True)
    expected = texts_of(rows)
    batches = training_batches(c, rows, BYTES, seed=seed, multiple=2)
    for _ in range(2):
        found = Counter()
        for batch in islice(batches, per_epoch(c, rows, seed)):
            check_shape(c, batch)
            found += check_pairs(batch)
        assert found >= expected  # with a few repeated, to fill the last batches
        assert found.keys() == expected.keys()
        assert found.total() <= 2 * expected.total()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(words, words), max_size=50))
def test_evaluation_holds_each_pair_once(pairs):
    c = config("seq2seq", buckets=(8, 12, 24))
    rows = tokenise(c, BYTES, [Example(s, (t,)) for s, t in pairs], one_per_target=False)
    found = Counter()
    for batch in evaluation_batches(c, rows, BYTES, multiple=2):
        check_shape(c, batch)
        found += check_pairs(batch)
    assert found == texts_of(rows)


def test_evaluation_never_leaves_out_long_pairs_and_training_counts_them():
    c = config("seq2seq", buckets=(8,), batch_tokens=16)
    pairs = [Example("s" * i, ("t" * (40 - i),)) for i in range(41)] + [Example("a", ("b",))]
    rows = tokenise(c, BYTES, pairs, one_per_target=True)
    assert left_out(c, rows) == 41
    found, shapes = Counter(), Counter()
    for batch in evaluation_batches(c, rows, BYTES, multiple=2):
        found += check_pairs(batch)
        shapes[batch.labels.shape] += 1
    assert found == texts_of(rows)
    assert shapes.keys() == {(2, 8), (2, 32), (2, 64)}
    batch = next(training_batches(c, rows, BYTES, seed=0, multiple=2))
    assert check_pairs(batch).keys() == {(tuple(BYTES.encode("a")) + (1,), (*BYTES.encode("b"), 1))}
    none = tokenise(c, BYTES, pairs[:41], one_per_target=True)
    with pytest.raises(DataError, match="none of the 41"):
        training_batches(c, none, BYTES, seed=0, multiple=2)


def test_short_evaluation_batches_are_filled_with_padding():
    c = config("lm")
    rows = tokenise(c, BYTES, [Example("", ("abc",))], one_per_target=False)
    (batch,) = evaluation_batches(c, rows, BYTES, multiple=2)
    check_shape(c, batch)
    assert batch.weights.sum() == 4
    assert batch.target is not None and not batch.target.seg[1:].any()
    assert list(evaluation_batches(c, tokenise(c, BYTES, [], False), BYTES, multiple=2)) == []


def test_documents_are_never_left_out():
    assert left_out(config("lm"), numbered(config("lm"), 9, longest=90)) == 0
    assert left_out(config("mlm"), numbered(config("mlm"), 9, longest=90)) == 0


def windows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each segment of an lm batch, empty rows left out."""
    assert batch.target is not None and batch.source is None
    assert np.array_equal(batch.weights > 0, batch.target.seg > 0)
    pairs = zip(
        segments(batch.target, batch.target.ids), segments(batch.target, batch.labels), strict=True
    )
    return [pair for row in pairs for pair in zip(*row, strict=True)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.booleans())
def test_evaluation_windows_join_up_to_the_documents(sizes, pack):
    c = config("lm", pack=pack)
    texts = ["".join(chr(97 + (i * i) % 26) for i in range(n)) for n in sizes]
    rows = tokenise(c, BYTES, [Example("", (text,)) for text in texts], one_per_target=False)
    found = Counter()
    for batch in evaluation_batches(c, rows, BYTES, multiple=2):
        check_shape(c, batch)
        for inputs, labels in windows(batch):
            assert inputs[1:] == labels[:-1]
            found.update(labels)
    assert found == Counter(rows.target_ids.tolist())


@pytest.mark.parametrize("pack", [False, True])
def test_training_windows_cover_each_token_once_an_epoch_and_move(pack):
    c = config("lm", pack=pack)
    # Every two neighbours differ, so that a window tells where it stands.
    text = "".join(chr(i) for i in range(0x100, 0x500))
    ids = [BYTES.start_id, *BYTES.encode(text), BYTES.eos_id]
    rows = tokenise(c, BYTES, [Example("", (text,))], one_per_target=True)
    place = {(a, b, d): i for i, (a, b, d) in enumerate(zip(ids, ids[1:], ids[2:], strict=False))}
    batches = training_batches(c, rows, BYTES, seed=3, multiple=2)
    starts = []
    for _ in range(3):
        seen = Counter()
        for batch in islice(batches, per_epoch(c, rows, 3)):
            check_shape(c, batch)
            for inputs, labels in windows(batch):
                assert inputs[1:] == labels[:-1] and len(labels) <= 24
                if len(labels) >= 2:
                    at = place[inputs[0], labels[0], labels[1]]
                    assert [*inputs, labels[-1]] == ids[at : at + len(labels) + 1]
                    starts.append(at % 24)
                    seen.update(range(at, at + len(labels)))
        # A window of one token is not placed above; the last batch repeats rows of the first.
        assert len(seen) >= len(ids) - 3
    assert len(set(starts) - {0}) == 3


def masked(c: DataConfig, rows: Rows, seed: int, n: int) -> list[Batch]:
    return list(islice(training_batches(c, rows, BYTES, seed=seed, multiple=2), n))


def test_masking_rates():
    c = config("mlm", mask_rate=0.2, buckets=(512,), batch_tokens=512 * 40)
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 500))) for _ in range(40)]
    rows = tokenise(c, BYTES, [Example("", (text,)) for text in texts], one_per_target=True)
    read, hidden, kept, other = 0, 0, 0, 0
    for batch in masked(c, rows, 0, 5):
        assert batch.target is None and batch.source is not None
        check_shape(c, batch)
        picked, ids = batch.weights > 0, batch.source.ids
        read += (batch.source.seg > 0).sum()
        hidden += (ids[picked] == BYTES.mask_id).sum()
        kept += (ids[picked] == batch.labels[picked]).sum()
        wrong = ids[picked & (ids != batch.labels) & (ids != BYTES.mask_id)]
        assert wrong.min() >= 4 and wrong.max() < BYTES.vocab_size and len(set(wrong.tolist())) > 50
        other += len(wrong)
        assert not (batch.labels == BYTES.eos_id).any()
    total = hidden + kept + other
    for share, of, expected in [
        (total, read, 0.2),
        (hidden, total, 0.8),
        (kept, total, 0.1),
        (other, total, 0.1),
    ]:
        deviation = (expected * (1 - expected) / of) ** 0.5
        assert abs(share / of - expected) < 5 * deviation


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abc", max_size=60), min_size=1, max_size=30), st.integers(0, 9))
def test_masked_rows_hide_something_and_nothing_else_changes(texts, seed):
    c = config("mlm", mask_rate=0.01)
    rows = tokenise(c, BYTES, [Example("", (text,)) for text in texts], one_per_target=False)
    found = Counter()
    for batch in evaluation_batches(c, rows, BYTES, multiple=2):
        check_shape(c, batch)
        assert batch.source is not None
        real = batch.source.seg.any(1)
        assert (batch.weights[real].sum(1) >= 1).all()
        whole = np.where(batch.weights > 0, batch.labels, batch.source.ids)
        found.update(whole[batch.source.seg > 0].tolist())
    assert found == Counter(rows.target_ids.tolist())


def test_masks_do_not_depend_on_batching_but_on_the_epoch():
    texts = [f"{i:02d}" + "abcdefghij"[: i % 10] * 2 for i in range(48)]

    def by_text(batch_tokens: int, epochs: int) -> list[dict]:
        c = config("mlm", batch_tokens=batch_tokens, buckets=(24,))
        rows = tokenise(c, BYTES, [Example("", (text,)) for text in texts], one_per_target=True)
        n = 48 * 24 // batch_tokens
        batches = masked(c, rows, 5, n * epochs)
        result = []
        for epoch in range(epochs):
            seen = {}
            for batch in batches[epoch * n : (epoch + 1) * n]:
                assert batch.source is not None
                whole = np.where(batch.weights > 0, batch.labels, batch.source.ids)
                for row, ids in zip(whole, batch.source.ids, strict=True):
                    seen[BYTES.decode(row)] = ids.tolist()
            assert seen.keys() == set(texts)
            result.append(seen)
        return result

    once, twice = by_text(24 * 4, 2)
    assert [once, twice] == by_text(24 * 8, 2)
    assert once != twice


ORDERS = [
    config("seq2seq"),
    config("seq2seq", pack=True),
    config("lm"),
    config("lm", pack=True),
    config("mlm"),
]
EACH = pytest.mark.parametrize("c", ORDERS, ids=lambda c: f"{c.task}{'-packed' if c.pack else ''}")


@EACH
def test_batches_go_on_the_same_on_another_mesh(c):
    """Begun on eight devices: two and one go on with the same examples."""
    rows = numbered(c, 60, longest=60 if c.task != "seq2seq" else 20)
    c = replace(c, batch_tokens=24 * 9)  # nine rows, of which eight devices make sixteen
    eight = training_batches(c, rows, BYTES, seed=1, multiple=8)
    next(eight), next(eight)
    state = json.loads(json.dumps(eight.get_state()))
    expected = [without_filling(batch) for batch in islice(eight, 30)]
    for multiple in (2, 1):
        fewer = training_batches(c, rows, BYTES, seed=1, multiple=multiple)
        fewer.set_state(state)
        for batch, wanted in zip(fewer, expected, strict=False):
            assert equal(without_filling(batch), wanted)


def without_filling(batch: Batch) -> Batch:
    """The rows of a batch that are not there only to fill it up."""
    learner = batch.target or batch.source
    assert learner is not None
    real = learner.seg.any(1)
    source, target = (
        side and Tokens(*(array[real] for array in side)) for side in (batch.source, batch.target)
    )
    return Batch(source, target, batch.labels[real], batch.weights[real])


@EACH
def test_resumed_batches_equal_uninterrupted_ones(c):
    rows = numbered(c, 60, longest=60 if c.task != "seq2seq" else 20)
    batches = training_batches(c, rows, BYTES, seed=1, multiple=2)
    skipped = list(islice(batches, 7))
    state = json.loads(json.dumps(batches.get_state()))
    rest = list(islice(batches, 60))  # over the end of the epoch
    again = training_batches(c, rows, BYTES, seed=1, multiple=2)
    again.set_state(state)
    assert all(map(equal, rest, islice(again, 60)))
    assert not all(map(equal, rest, skipped))
    other = training_batches(c, rows, BYTES, seed=2, multiple=2)
    assert not all(
        a.labels.shape == b.labels.shape and equal(a, b)
        for a, b in zip(skipped, islice(other, 7), strict=True)
    )


@EACH
def test_shares_of_processes_make_up_the_batch(c):
    rows = numbered(c, 60)
    for make in (training(c, rows), evaluation(c, rows)):
        whole = islice(make(0, 1), 20)
        first, second = islice(make(0, 2), 20), islice(make(1, 2), 20)
        for batch, *shares in zip(whole, first, second, strict=True):
            pairs = zip(*map(arrays, shares), strict=True)
            joined = [np.concatenate(pair) for pair in pairs]
            assert all(map(np.array_equal, arrays(batch), joined))


def training(c: DataConfig, rows: Rows) -> Any:
    return lambda i, n: training_batches(
        c, rows, BYTES, seed=1, multiple=2, process_index=i, process_count=n
    )


def evaluation(c: DataConfig, rows: Rows) -> Any:
    return lambda i, n: evaluation_batches(
        c, rows, BYTES, multiple=2, process_index=i, process_count=n
    )


@given(st.integers(1, 5000), st.sampled_from([8, 16, 24]), st.integers(1, 64))
def test_rows_per_batch(tokens, bucket, multiple):
    c = config("lm", batch_tokens=max(tokens, 24))
    try:
        rows = rows_per_batch(c, bucket, multiple)
    except ConfigError as e:
        assert c.batch_tokens < bucket * multiple
        assert f"at least {bucket * multiple}," in str(e)
        enough = replace(c, batch_tokens=max(bucket * multiple, 24))
        assert rows_per_batch(enough, bucket, multiple) >= multiple
    else:
        assert rows >= multiple and rows * bucket <= c.batch_tokens < (rows + 1) * bucket


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=50), st.integers(1, 3))
def test_a_batch_holds_the_same_examples_on_any_mesh(pairs, multiple):
    c = config("seq2seq")
    rows = tokenise(c, BYTES, [Example(s, (t,)) for s, t in pairs], one_per_target=True)
    one = islice(training_batches(c, rows, BYTES, seed=1, multiple=1), 10)
    many = islice(training_batches(c, rows, BYTES, seed=1, multiple=multiple), 10)
    for small, large in zip(one, many, strict=True):
        n = len(small.labels)
        assert len(large.labels) == -(-n // multiple) * multiple
        for a, b in zip(arrays(small), arrays(large), strict=True):
            assert np.array_equal(a, b[:n]) and not b[n:].any()


WORKERS = """
import numpy as np
from dataclasses import replace
from itertools import islice
from jaxformer.config import DataConfig
from jaxformer.data.pipeline import training_batches
from jaxformer.data.sources import Example
from jaxformer.data.tasks import tokenise
from jaxformer.data.tokenizer import ByteTokenizer

if __name__ == "__main__":
    config = DataConfig(task="lm", buckets=(8, 16), batch_tokens=64)
    texts = [Example("", ("t" * (i % 19),)) for i in range(40)]
    rows = tokenise(config, ByteTokenizer(), texts, one_per_target=True)
    streams = [
        training_batches(replace(config, workers=n), rows, ByteTokenizer(), seed=0, multiple=2)
        for n in (0, 1)
    ]
    for a, b in islice(zip(*streams), 30):
        assert a.source is None and b.source is None
        for x, y in zip((*a.target, a.labels, a.weights), (*b.target, b.labels, b.weights)):
            assert x.dtype == y.dtype and np.array_equal(x, y)
    state = streams[1].get_state()
    expected = next(streams[1])
    streams[1].set_state(state)
    assert np.array_equal(expected.labels, next(streams[1]).labels)
    for stream in streams:
        stream.close()
    print("equal")
"""


@pytest.mark.slow
def test_workers_make_the_same_batches(tmp_path):
    (tmp_path / "main.py").write_text(WORKERS)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, "equal\n"), run.stderr
