"""Import and export of a family's tensors: strict, lazy, and the same table both ways.

Nothing is read before all names and shapes fit; then each leaf is read where it will live, part by
part, so that a device reads only its own share of a file.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from jaxformer.config import ModelConfig
from jaxformer.errors import CheckpointError
from jaxformer.hub.family import Family, Row, axes
from jaxformer.hub.tensors import Stored

LISTED = 20  # problems of one kind that a message lists
ALIGNMENT = 64
"""Of arrays that jax takes for its own on a CPU, which copies others."""


class Part(NamedTuple):
    """Where one layer of a leaf lies: a stretch of one of their tensors, and how to turn it."""

    stored: Stored
    axis: int
    start: int
    stop: int
    layout: str
    sizes: Mapping[str, int]

    def view(self) -> np.ndarray:
        """That layer as ours: a view of the file, of which nothing has been read yet."""
        index = [slice(None)] * len(self.stored.shape)
        index[self.axis] = slice(self.start, self.stop)
        return rearrange(self.stored.read()[tuple(index)], self.layout, **self.sizes)


@dataclass(frozen=True)
class Leaf:
    """One of our parameters, to be read from a checkpoint in any part and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: tuple[Part, ...]
    stacked: bool

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The part `index` of the leaf; zeros where theirs is shorter (a padded vocabulary)."""
        spans = [s.indices(n) for s, n in zip(index, self.shape, strict=True)]
        out = aligned_zeros([len(range(*span)) for span in spans], np.dtype(dtype))
        if not self.stacked:
            self._fill(out, self.layers[:1], spans)
            return out
        for place, layer in zip(out, range(*spans[0]), strict=True):
            self._fill(place, self.layers[layer : layer + 1], spans[1:])
        return out

    def _fill(
        self, out: np.ndarray, parts: Sequence[Part], spans: list[tuple[int, int, int]]
    ) -> None:
        for part in parts:  # none, if an optional tensor is absent
            found = part.view()[tuple(slice(*span) for span in spans)]
            out[tuple(slice(n) for n in found.shape)] = found


def aligned_zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros that jax need not copy, so that a model is in memory once while it is read."""
    size = math.prod(shape) * dtype.itemsize
    room = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    return room[begin : begin + size].view(dtype).reshape(shape)


def sizes(config: ModelConfig) -> dict[str, int]:
    """The letters of layouts: what each axis measures in this model, without padding."""
    return {
        "d": config.d_model,
        "e": config.d_model,
        "f": config.d_ff,
        "n": config.n_heads,
        "k": config.kv_heads,
        "h": config.dim_per_head,
        "v": config.vocab_size - config.vocab_padding,
        "s": config.source_vocab_size,
        "p": config.max_length + config.position_offset,
        "t": config.n_token_types,
        "b": config.relative_buckets,
        "c": len(config.labels),
        "1": 1,
    }


def settle_head(family: Family, config: ModelConfig, tensors: Mapping[str, Stored]) -> ModelConfig:
    """`config` with its head tied or not, as the tensors are: configs are known to be wrong."""
    names = {path: row.theirs for row in rows_of(family, config) for path in row.ours}
    if config.head != "tokens" or "head/kernel" not in names:
        return config
    there = named(family, tensors)
    head, table = (there.get(names[path]) for path in ("head/kernel", "embed/embedding"))
    tied = config.tie_embeddings
    if head is None:
        tied |= family.tied_if_absent
    elif tied and table is not None and head.shape == table.shape:
        tied = np.array_equal(head.read(), table.read())
    return dataclasses.replace(config, tie_embeddings=tied)


def bind(
    family: Family,
    config: ModelConfig,
    leaves: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Stored],
    where: str,
) -> dict[str, Leaf]:
    """Each of our leaves (path to shape), bound to the tensors that hold it.

    Raises `CheckpointError` listing every tensor that is missing, unexpected or of another shape.
    """
    tensors = named(family, tensors)
    bound: dict[str, Leaf] = {}
    missing, wrong, used = [], [], set()
    for row in rows_of(family, config):
        if not any(path in leaves for path in row.ours):
            continue
        layers = n_layers(row, leaves)
        parts: dict[str, list[Part]] = {path: [] for path in row.ours}
        for i in range(layers or 1):
            name = row.theirs.replace("*", str(i))
            wanted, stretches = theirs_shape(row, config)
            if name not in tensors:
                if not row.optional:
                    missing.append(f"{name} {list(wanted)}")
                continue
            used.add(name)
            stored = tensors[name]
            if stored.shape != wanted:
                wrong.append(f"{name}: {list(stored.shape)} there, {list(wanted)} wanted")
                continue
            for path, layout, (start, stop) in zip(row.ours, row.layouts, stretches, strict=True):
                letters = letters_of(layout, config)
                parts[path].append(Part(stored, row.axis, start, stop, layout, letters))
        for path, found in parts.items():
            dtype = found[0].stored.dtype if found else np.dtype(np.float32)
            bound[path] = Leaf(leaves[path], dtype, tuple(found), layers is not None)
    extra = [
        f"{name} {list(stored.shape)}"
        for name, stored in tensors.items()
        if name not in used and not any(fnmatch.fnmatch(name, p) for p in family.ignored)
    ]
    homeless = [path for path in leaves if path not in bound]
    problems = {
        "missing": missing,
        "unexpected": extra,
        "of another shape": wrong,
        f"unknown to {family.name} checkpoints": homeless,
    }
    if any(problems.values()):
        raise CheckpointError(
            f"{where} does not fit its config, read as a {family.name} model "
            f"({config.kind}, {config.n_encoder_layers} + {config.n_decoder_layers} layers):\n"
            + "\n".join(_listed(kind, names) for kind, names in problems.items() if names)
            + "\nIs the config of another model, or the download incomplete?"
        )
    return bound


def export(
    family: Family, config: ModelConfig, leaves: Mapping[str, Stored], *, prefixed: bool
) -> dict[str, Stored]:
    """Their tensors of our leaves, none of which is read yet; `prefixed` as in `is_prefixed`.

    Raises `CheckpointError` if the family has no place for one of our leaves.
    """
    rows = rows_of(family, config)
    placed = {path for row in rows for path in row.ours}
    homeless = [path for path in leaves if path not in placed]
    if homeless:
        raise CheckpointError(
            f"{family.name} checkpoints have no place for\n" + _listed("parameters", homeless)
        )
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    theirs = {}
    for row in rows:
        if not all(path in leaves for path in row.ours):
            continue
        layers = n_layers(row, shapes)
        shape, _ = theirs_shape(row, config)
        for i in range(layers or 1):
            name = row.theirs.replace("*", str(i))
            name = name if prefixed else name.removeprefix(family.prefix)
            read = partial(_join, row, config, leaves, None if layers is None else i)
            theirs[name] = Stored(shape, leaves[row.ours[0]].dtype, read)
    return theirs


def _join(
    row: Row, config: ModelConfig, leaves: Mapping[str, Stored], layer: int | None
) -> np.ndarray:
    """Their tensor of our leaves, or of one layer of them; padding of the vocabulary stays here."""
    letters, parts = sizes(config), []
    for path, layout in zip(row.ours, row.layouts, strict=True):
        left, right = layout.split(" -> ")
        leaf = leaves[path].read() if layer is None else leaves[path].read()[layer]
        leaf = leaf[tuple(slice(letters[axis]) for axis in right.split())]
        parts.append(rearrange(leaf, f"{right} -> {left}", **letters_of(layout, config)))
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, row.axis))


def letters_of(layout: str, config: ModelConfig) -> dict[str, int]:
    """The sizes of the letters in a layout, which is all that einops wants to know."""
    return {letter: n for letter, n in sizes(config).items() if letter in layout and letter != "1"}


def rows_of(family: Family, config: ModelConfig) -> list[Row]:
    """The rows that hold for this model."""
    return [row for row in family.rows if all(getattr(config, k) == v for k, v in row.only)]


def theirs_shape(row: Row, config: ModelConfig) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """The shape of their tensor, and the stretch of its axis that each of ours takes."""
    letters = sizes(config)
    shapes = [
        [math.prod(letters[letter] for letter in axis.strip("()").split()) for axis in axes(left)]
        for left in (layout.split(" -> ")[0] for layout in row.layouts)
    ]
    stops = np.cumsum([shape[row.axis] for shape in shapes]).tolist()
    whole = list(shapes[0])
    whole[row.axis] = stops[-1]
    return tuple(whole), list(zip([0, *stops[:-1]], stops, strict=True))


def n_layers(row: Row, leaves: Mapping[str, Any]) -> int | None:
    """How many of their tensors a row stands for; None for one outside of the layers."""
    path = next(path for path in row.ours if path in leaves)
    return leaves[path][0] if "/layers/" in path else None


def is_prefixed(family: Family, tensors: Mapping[str, Any]) -> bool:
    """Whether the names have the family's prefix, as those of models with a head do."""
    return any(name.startswith(family.prefix) for name in tensors)


def named(family: Family, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors under the names of the table: old endings renewed, the prefix put before all."""
    named = {}
    prefix = "" if is_prefixed(family, tensors) else family.prefix
    heads = tuple(row.theirs for row in family.rows if not row.theirs.startswith(family.prefix))
    for name, stored in tensors.items():
        for old, new in family.renames:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        named[name if name in heads else prefix + name] = stored
    return named


def _listed(kind: str, names: Sequence[str]) -> str:
    more = f"\n    and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"  {kind}:\n    " + "\n    ".join(names[:LISTED]) + more
