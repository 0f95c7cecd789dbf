"""Each epoch holds every part of every example, in rows and batches of planned sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.config import DataConfig
from jaxformer.data.layout import (
    first_fit,
    first_windows,
    lay_out,
    n_batches,
    n_windows,
    plan,
    ragged,
)
from jaxformer.data.tasks import Rows

sides = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=60)
seeds = st.integers(0, 2**32)


def rows_of(source: list[int], target: list[int]) -> Rows:
    """Rows of the given lengths, of which only the lengths matter."""
    offsets = [np.concatenate([[0], np.cumsum(size)]).astype(np.int64) for size in (source, target)]
    ids = [np.zeros(o[-1], np.int32) for o in offsets]
    return Rows(ids[0], offsets[0], ids[1], offsets[1])


@given(st.lists(st.integers(0, 5)))
def test_ragged(counts):
    group, number = ragged(np.array(counts, int))
    expected = [(i, j) for i, n in enumerate(counts) for j in range(n)]
    assert list(zip(group.tolist(), number.tolist(), strict=True)) == expected


@given(st.lists(st.sampled_from([8, 16, 32]), max_size=200), seeds, st.integers(0, 9))
def test_plan_holds_every_row_in_full_batches_of_its_length(bucket, seed, epoch):
    bucket, sizes = np.array(bucket, int), {8: 12, 16: 6, 32: 3}
    batches = plan(bucket, sizes, seed, epoch)
    assert len(batches) == n_batches(bucket, sizes)
    times = np.zeros(len(bucket), int)
    for length, rows in batches:
        assert len(rows) == sizes[length]
        filled = rows[rows >= 0]
        assert (bucket[filled] == length).all()
        assert len(set(filled.tolist())) == len(filled)  # never twice in one batch
        times[filled] += 1
        assert len(filled) == len(rows) or (bucket == length).sum() == len(filled)
    assert set(times.tolist()) <= {1, 2}
    for length, size in sizes.items():
        assert (times[bucket == length] == 2).sum() < size


def test_plan_follows_from_seed_and_epoch():
    bucket, sizes = np.repeat([8, 16], 50), {8: 4, 16: 2}

    def flat(seed: int, epoch: int) -> list[int]:
        return [r for _, rows in plan(bucket, sizes, seed, epoch) for r in rows.tolist()]

    assert flat(0, 0) == flat(0, 0)
    assert flat(0, 0) != flat(0, 1)
    assert flat(0, 0) != flat(1, 0)
    lengths = [length for length, _ in plan(bucket, sizes, 0, 0)]
    assert lengths != sorted(lengths)  # buckets are mixed


@given(sides, seeds)
def test_pairs_go_to_the_shortest_bucket_that_holds_them(pairs, seed):
    source, target = map(list, zip(*pairs, strict=True))
    config = DataConfig(task="seq2seq")
    layout = lay_out(config, rows_of(source, target), (8, 16, 32), False, seed)
    need = {i: max(pair) for i, pair in enumerate(pairs) if max(pair) <= 32}
    assert layout.example.tolist() == list(need)
    expected = [min(b for b in (8, 16, 32) if b >= n) for n in need.values()]
    assert layout.bucket.tolist() == expected
    assert (layout.segment == 1).all()
    assert not layout.source_column.any() and not layout.target_column.any()
    assert (layout.window == 0).all()


@given(sides, seeds)
def test_packed_parts_fit_and_do_not_overlap(pairs, seed):
    source, target = map(list, zip(*pairs, strict=True))
    config = DataConfig(task="seq2seq")
    layout = lay_out(config, rows_of(source, target), (8, 32), True, seed)
    assert sorted(layout.example.tolist()) == [i for i, p in enumerate(pairs) if max(p) <= 32]
    assert (layout.bucket == 32).all()
    for begin, end in zip(layout.parts[:-1], layout.parts[1:], strict=True):
        assert layout.segment[begin:end].tolist() == list(range(1, end - begin + 1)) != []
        at = [0, 0]
        for part in range(begin, end):
            assert [layout.source_column[part], layout.target_column[part]] == at
            example = layout.example[part]
            at = [at[0] + source[example], at[1] + target[example]]
        assert max(at) <= 32


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_first_fit_wastes_less_than_half(sizes):
    row = first_fit(np.zeros(len(sizes), int), np.array(sizes), 16)
    used = np.bincount(row, sizes)
    assert used.max() <= 16
    assert set(row.tolist()) == set(range(len(used)))
    # Of any two rows, the later was opened since its first part did not fit into the earlier.
    assert sum(used) * 2 >= 16 * (len(used) - 1)


def test_first_fit_closes_the_fullest_row_when_many_are_open():
    n = 10_000
    row = first_fit(np.zeros(n, int), np.full(n, 9), 16)
    assert row.tolist() == list(range(n))
    sizes = [9, *[15] * 63, 15, 7]  # 64 are open when the last 15 comes
    assert first_fit(np.zeros(66, int), np.array(sizes), 16).tolist() == [*range(65), 0]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), seeds, st.integers(0, 5))
def test_windows_hold_all_of_each_document(target, seed, epoch):
    n = 16
    rows = rows_of([0] * len(target), target)
    first = first_windows(rows, n, seed, epoch)
    windows = n_windows(np.array(target), n)
    assert ((first >= 1) & (first <= n)).all()
    assert (first + (windows - 1) * n >= target).all()
    assert (first[np.array(target) <= n] == n).all()
    layout = lay_out(DataConfig(), rows, (8, n), False, seed)
    assert np.bincount(layout.example).tolist() == windows.tolist()
    assert (windows <= -(-np.array(target) // n) * 1.1).all()


@pytest.mark.parametrize("need", [16 * 20, 16 * 20 + 1, 16 * 20 + 15])
def test_the_first_window_of_a_long_document_takes_any_length(need):
    rows = rows_of([0], [need])
    seen = {int(first_windows(rows, 16, 0, epoch)[0]) for epoch in range(500)}
    assert seen == set(range(1, 17))
