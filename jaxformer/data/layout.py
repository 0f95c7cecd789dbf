"""Which tokens stand in which row of which batch, planned for a run and then for each epoch.

Examples are cut into parts (only documents longer than the longest bucket, in windows; all others
are one part) and the parts laid into rows: one each, or several when packed. That layout is fixed
for a run, so all epochs are equally long and the number of a batch tells its epoch. Each epoch
shuffles the rows within their buckets, then the batches, and draws anew where documents are cut.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxformer.config import DataConfig
from jaxformer.data.tasks import Rows

Ints = Int[np.ndarray, "_"]
OPEN_ROWS = 64
"""Rows that packing keeps open at once, so that its time is linear."""


class Layout(NamedTuple):
    """P parts in R rows, sorted by row."""

    example: Int[np.ndarray, "P"]
    """The example that the part is of."""
    window: Int[np.ndarray, "P"]
    """Number of the part among those of its example."""
    segment: Int[np.ndarray, "P"]
    """Number of the part in its row, from 1."""
    source_column: Int[np.ndarray, "P"]
    target_column: Int[np.ndarray, "P"]
    parts: Int[np.ndarray, "R+1"]
    """Row r holds the parts from parts[r] to before parts[r + 1]."""
    bucket: Int[np.ndarray, "R"]
    """Length that the row is padded to."""


def lengths(rows: Rows) -> tuple[Ints, Ints]:
    """Tokens of each example's source and target, with eos (or, as decoder input, with start)."""
    return np.diff(rows.source_offsets), np.diff(rows.target_offsets)


def ragged(counts: Ints) -> tuple[Ints, Ints]:
    """For items in groups of the given sizes: the group of each, and its number in the group.

    >>> ragged(np.array([2, 0, 1]))
    (array([0, 0, 2]), array([0, 1, 0]))
    """
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - (np.cumsum(counts) - counts)[group]


def n_windows(need: Ints, longest: int) -> Ints:
    """Windows that documents of `need` tokens are cut into.

    Those over ten windows get one more than they fill, so that the first may have any length.
    """
    return -(-need // longest) + (need > 10 * longest)


def first_windows(rows: Rows, longest: int, seed: int, epoch: int) -> Ints:
    """Length of the first window of each document, drawn so that `n_windows` hold all of it."""
    need = lengths(rows)[1]
    slack = np.minimum(n_windows(need, longest) * longest - need, longest - 1)
    drawn = np.random.default_rng((seed, epoch)).integers(0, slack, endpoint=True)
    return np.where(need > longest, longest - drawn, longest)


def lay_out(
    config: DataConfig, rows: Rows, buckets: tuple[int, ...], pack: bool, seed: int
) -> Layout:
    """Lay examples, or windows of them, into rows as long as one of `buckets`.

    Pairs longer than the longest are left out. A window has a row of the longest to itself.
    """
    longest = buckets[-1]
    source, target = lengths(rows)
    if config.task == "seq2seq":
        windows = (np.maximum(source, target) <= longest).astype(int)
    else:
        windows = n_windows(target, longest)
    example, window = ragged(windows)
    source, target = source[example], np.where(windows[example] > 1, longest, target[example])
    row = np.arange(len(example))
    if pack:
        order = np.random.default_rng(seed).permutation(len(example))
        row[order] = first_fit(source[order], target[order], longest)
    order = np.argsort(row, kind="stable")
    source, target, sizes = source[order], target[order], np.bincount(row)
    group, number = ragged(sizes)
    parts = np.concatenate([[0], np.cumsum(sizes)])

    def column(size: Ints) -> Ints:
        before = np.cumsum(size) - size
        return before - before[parts[group]]

    need = np.full(len(sizes), longest) if pack else np.maximum(source, target)
    bucket = np.array(buckets)[np.searchsorted(buckets, need)]
    return Layout(
        example[order], window[order], number + 1, column(source), column(target), parts, bucket
    )


def first_fit(source: Ints, target: Ints, length: int) -> Ints:
    """The row of each part: the first open one with room for both sides in `length` tokens.

    If there is none, the fullest of OPEN_ROWS is closed and a new one opened in its place.
    """
    used = np.full((2, OPEN_ROWS), length)
    open_row = np.zeros(OPEN_ROWS, int)
    row = np.empty(len(source), int)
    n_rows = 0
    for i, size in enumerate(np.stack([source, target], 1)[:, :, None]):
        fits = (used + size <= length).all(0)
        at = int(fits.argmax())
        if not fits[at]:
            at = int(used.max(0).argmax())
            used[:, at], open_row[at], n_rows = 0, n_rows, n_rows + 1
        used[:, at] += size[:, 0]
        row[i] = open_row[at]
    return row


def n_batches(bucket: Ints, sizes: dict[int, int]) -> int:
    """Batches of one epoch."""
    return sum(-(-int((bucket == length).sum()) // size) for length, size in sizes.items())


def plan(bucket: Ints, sizes: dict[int, int], seed: int, epoch: int) -> list[tuple[int, Ints]]:
    """The batches of one epoch, in order: the length of each and the rows it holds.

    `bucket` is the length of each row, `sizes` the rows in a batch of each length. The last batch
    of a length is filled up with rows of its first, or, if there are too few for even one, with -1
    (empty rows). So every row comes once, and a few twice.
    """
    rng = np.random.default_rng((seed, epoch))
    batches = []
    for length, size in sizes.items():
        order = rng.permutation(np.flatnonzero(bucket == length))
        if len(order) >= size:
            order = np.concatenate([order, order[: -len(order) % size]])
        batches += [(length, rows) for rows in in_batches(order, size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def in_batches(order: Ints, size: int) -> list[Ints]:
    """`order` cut into batches of `size`, the last filled up with -1.

    >>> in_batches(np.arange(3), 2)
    [array([0, 1]), array([ 2, -1])]
    """
    padded = np.full(-(-len(order) // size) * size, -1)
    padded[: len(order)] = order
    return list(padded.reshape(-1, size))
