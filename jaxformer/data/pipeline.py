"""Tokenised rows to batches of fixed shapes, any of which can be made from its number alone.

All follows from the seed and the number of the batch: every process plans the same batches and
takes its share of their rows, and where a run stopped is one number.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from jaxformer.config import DataConfig
from jaxformer.data.layout import (
    Ints,
    Layout,
    first_windows,
    in_batches,
    lay_out,
    lengths,
    n_batches,
    plan,
    ragged,
)
from jaxformer.data.tasks import Rows
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import ConfigError, DataError
from jaxformer.types import Batch, Tokens

if TYPE_CHECKING:
    import grain


def rows_per_batch(config: DataConfig, bucket: int, multiple: int) -> int:
    """Examples in a batch of length `bucket`, whatever the mesh: as many as `batch_tokens` holds.

    Raises `ConfigError` if they are fewer than `multiple`, the parts a batch is cut into.
    """
    rows = config.batch_tokens // bucket
    if rows < multiple:
        raise ConfigError(
            f"data.batch_tokens {config.batch_tokens} is {rows} rows of bucket {bucket}, but the "
            f"mesh (data x fsdp) and accumulate cut each batch into {multiple} parts; set "
            f"data.batch_tokens to at least {bucket * multiple}, or use fewer parts."
        )
    return rows


def left_out(config: DataConfig, rows: Rows) -> int:
    """How many examples are too long for the longest bucket, and so left out of training."""
    too_long = np.maximum(*lengths(rows)) > config.buckets[-1]
    return int(too_long.sum()) if config.task == "seq2seq" else 0


def longest_pair(config: DataConfig, rows: Rows) -> int:
    """Tokens of the longer side of the longest pair; documents are cut, so they count as 0."""
    return int(np.maximum(*lengths(rows)).max(initial=0)) if config.task == "seq2seq" else 0


@dataclass(frozen=True)
class Assembler:
    """Makes the `Batch` of any rows of a layout."""

    config: DataConfig
    rows: Rows
    tokenizer: Tokenizer
    layout: Layout
    seed: int

    def batch(self, chosen: Ints, length: int, first: Ints, longest: int, epoch: int) -> Batch:
        """The batch of the `chosen` rows (-1 is an empty one), padded to `length`.

        `first` is the length of the first window of each example, `longest` of all its others.
        """
        task, rows, layout = self.config.task, self.rows, self.layout
        counts = np.where(chosen < 0, 0, layout.parts[chosen + 1] - layout.parts[chosen])
        row, number = ragged(counts)
        part = layout.parts[chosen][row] + number
        example, window, segment = layout.example[part], layout.window[part], layout.segment[part]
        shape = len(chosen), length

        start, stop = rows.target_offsets[example], rows.target_offsets[example + 1]
        begin = start + np.maximum(first[example] + (window - 1) * longest, 0)
        end = np.minimum(start + first[example] + window * longest, stop)
        size = np.maximum(end - begin, 0)
        group, within = ragged(size)
        index = begin[group] + within
        ids, weights = rows.target_ids[index], np.ones(len(index), np.float32)
        if task == "mlm":
            inputs, weights = self.mask(ids, part, size, epoch)
        else:  # each token is read after the one before it
            before = rows.target_ids[index - 1]
            inputs = np.where(index == start[group], self.tokenizer.start_id, before)
        at = row[group], layout.target_column[part][group] + within
        learner = self.tokens(inputs, at, within, segment[group], shape)
        source, target = (learner, None) if task == "mlm" else (None, learner)
        if task == "seq2seq":
            start, stop = rows.source_offsets[example], rows.source_offsets[example + 1]
            group, within = ragged(stop - start)
            ids_read = rows.source_ids[start[group] + within]
            to = row[group], layout.source_column[part][group] + within
            source = self.tokens(ids_read, to, within, segment[group], shape)
        labels = spread(np.where(weights > 0, ids, 0), at, shape)
        return Batch(source, target, labels, spread(weights, at, shape).astype(np.float32))

    def tokens(
        self, ids: Ints, at: tuple[Ints, Ints], pos: Ints, seg: Ints, shape: tuple[int, int]
    ) -> Tokens:
        """Flat ids, positions and segments at their rows and columns, padding elsewhere."""
        filled = spread(ids, at, shape, self.tokenizer.pad_id)
        return Tokens(filled, spread(pos, at, shape), spread(seg, at, shape))

    @cached_property
    def ordinary(self) -> Ints:
        """The ids that stand for text."""
        return np.setdiff1d(np.arange(self.tokenizer.vocab_size), [*self.tokenizer.special_ids])

    def mask(self, ids: Ints, part: Ints, size: Ints, epoch: int) -> tuple[Ints, np.ndarray]:
        """`ids` with some hidden, and weights of 1 where they are to be predicted.

        A share `mask_rate` is predicted, at least one in each part, special ids (but the unknown)
        only if they are alone: 80% of these read as the mask, 10% as a random id, 10% as they are
        (Devlin et al. 2019).
        """
        # Each part has its own generator, so that batching never changes what is masked.
        draws = [
            np.random.default_rng((self.seed, epoch, p)).random((3, n))
            for p, n in zip(part.tolist(), size.tolist(), strict=True)
        ]
        pick, how, which = np.concatenate([np.empty((3, 0)), *draws], 1)
        special = self.tokenizer.special_ids - {self.tokenizer.unk_id} | {self.tokenizer.eos_id}
        pick += np.isin(ids, [*special])
        group, _ = ragged(size)
        lowest = np.full(len(size), np.inf)
        np.minimum.at(lowest, group, pick)
        picked = (pick < self.config.mask_rate) | (pick == lowest[group])
        other = self.ordinary[(which * len(self.ordinary)).astype(int)]
        read = np.where(how < 0.8, self.tokenizer.mask_id, np.where(how < 0.9, other, ids))
        return np.where(picked, read, ids), picked.astype(np.float32)


def spread(
    values: np.ndarray, at: tuple[Ints, Ints], shape: tuple[int, int], fill: int = 0
) -> np.ndarray:
    """An int32 array of `shape` with flat `values` at their rows and columns, `fill` elsewhere."""
    out = np.full(shape, fill, np.int32)
    out[at] = values
    return out


@dataclass(frozen=True)
class Share:
    """The part of a batch's rows that one of several processes holds.

    Empty rows (-1) are added until `multiple` divides the rows, so that a batch holds the same
    examples on any mesh.
    """

    multiple: int
    process_index: int
    process_count: int

    def of(self, rows: Ints) -> Ints:
        """This process's rows of a batch."""
        (rows,) = in_batches(rows, -(-len(rows) // self.multiple) * self.multiple)
        share = len(rows) // self.process_count
        return rows[self.process_index * share : (self.process_index + 1) * share]


class Epochs:
    """Training batches without end, as a random access source for Grain."""

    def __init__(self, assembler: Assembler, sizes: dict[int, int], share: Share) -> None:
        self.assembler, self.sizes, self.share = assembler, sizes, share
        self.per_epoch = n_batches(assembler.layout.bucket, sizes)
        self.planned = -1, [], np.zeros(0, int)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        epoch, at = divmod(int(index), self.per_epoch)
        maker, longest = self.assembler, max(self.sizes)
        if self.planned[0] != epoch:
            batches = plan(maker.layout.bucket, self.sizes, maker.seed, epoch)
            self.planned = epoch, batches, first_windows(maker.rows, longest, maker.seed, epoch)
        _, batches, first = self.planned
        length, chosen = batches[at]
        return maker.batch(self.share.of(chosen), length, first, longest, epoch)


def training_batches(
    config: DataConfig,
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    seed: int,
    multiple: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "grain.DatasetIterator[Batch]":
    """Shuffled batches without end, of which this process gets its share of the rows.

    Empty rows fill each batch up to a multiple of `multiple`, itself one of `process_count`. The
    iterator's `get_state` can be kept as JSON and `set_state` goes on exactly there, given the same
    `workers`; with workers, call its `close` in the end. Raises `ConfigError` if `batch_tokens` is
    too small,
    `DataError` if no example fits.
    """
    import grain

    buckets = config.buckets[-1:] if config.pack else config.buckets
    sizes = {length: rows_per_batch(config, length, multiple) for length in buckets}
    layout = lay_out(config, rows, buckets, config.pack, seed)
    if not len(layout.bucket):
        raise DataError(
            f"none of the {len(rows)} training examples fits the longest bucket, {buckets[-1]}; "
            "add a longer one to data.buckets."
        )
    assembler = Assembler(config, rows, tokenizer, layout, seed)
    share = Share(multiple, process_index, process_count)
    source = Epochs(assembler, sizes, share)
    # All is in memory and quickly assembled: reading threads would only contend for the GIL.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches = grain.MapDataset.source(source).to_iter_dataset(options)
    if config.workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads flags that only absl's own main would parse
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2)
        )
    return iter(batches)


def evaluation_batches(
    config: DataConfig,
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    multiple: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every token of every row once, by bucket and in order, the last batches filled with padding.

    Pairs too long for the longest bucket get buckets of twice its length, and so on; a batch of
    those has `multiple` rows, even if that is over `batch_tokens`.
    """
    buckets = config.buckets
    sizes = {length: rows_per_batch(config, length, multiple) for length in buckets}
    need = np.maximum(*lengths(rows)).max(initial=0)
    while config.task == "seq2seq" and buckets[-1] < need:
        buckets += (2 * buckets[-1],)
        sizes[buckets[-1]] = multiple
    layout = lay_out(config, rows, buckets, pack=False, seed=0)
    assembler = Assembler(config, rows, tokenizer, layout, seed=0)
    first = np.full(len(rows), buckets[-1])
    share = Share(multiple, process_index, process_count)
    for length, size in sizes.items():
        for chosen in in_batches(np.flatnonzero(layout.bucket == length), size):
            yield assembler.batch(share.of(chosen), length, first, buckets[-1], epoch=0)
