"""Texts of any length in batches of few shapes: powers of two, so that compilations are bounded."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from jaxformer.types import Tokens


def power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def shortest(bucket: int) -> int:
    """The fewest tokens of a text in a bucket of lengths.

    >>> [shortest(bucket) for bucket in (8, 16, 32)]
    [1, 9, 17]
    """
    return bucket // 2 + 1 if bucket > 8 else 1


def in_buckets(lengths: Sequence[int], size: int) -> Iterator[tuple[list[int], int]]:
    """Row numbers in batches of at most `size`, and the bucket of length each batch falls in."""
    order = sorted(range(len(lengths)), key=lambda row: power_of_two(lengths[row], 8))
    batch: list[int] = []
    for row in order:
        bucket = power_of_two(lengths[row], 8)
        if batch and (len(batch) == size or bucket != power_of_two(lengths[batch[0]], 8)):
            yield batch, power_of_two(lengths[batch[0]], 8)
            batch = []
        batch.append(row)
    if batch:
        yield batch, power_of_two(lengths[batch[0]], 8)


def pad(
    ids: Sequence[Sequence[int] | Int[np.ndarray, "T"]], length: int, pad_id: int, parts: int = 1
) -> Tokens:
    """Right-pad to `length`, and to a power of two of rows in each of `parts`; rows that fill up
    repeat the first."""
    count = parts * power_of_two(-(-len(ids) // parts), 1)
    rows = [*ids, *([ids[0]] * (count - len(ids)))]
    out = np.full((len(rows), length), pad_id, np.int32)
    seg = np.zeros_like(out)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
        seg[row, : len(values)] = 1
    pos = np.arange(length, dtype=np.int32) * seg
    return Tokens(out, pos, seg)
