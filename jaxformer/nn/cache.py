"""The static-shape cache of keys and values: a pytree that goes in and comes out.

All rows write at one slot while each row keeps its own positions, so ragged prompts need no
special care. A step decodes W hypotheses of each row side by side, as W queries: the prompt's slots
are shared by all, and every step adds W slots. Keys and values never move when hypotheses change
parents; only `seen` does, the small table of which slots lie in whose history.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import ModelConfig
from jaxformer.nn.functional import READ
from jaxformer.types import NOWHERE


class KV(NamedTuple):
    """Keys and values of one attention layer, each head's together."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


class Cache(NamedTuple):
    """What a decoder remembers: for each layer its own keys and values and those of the memory,
    and what stands in each slot. `filled` is the number of slots written, and so the next free one.
    """

    own: tuple[KV, ...]
    cross: tuple[KV, ...]
    cross_seg: Int[Array, "B M"] | None
    pos: Int[Array, "B S"]
    seen: Bool[Array, "B W S"] | None
    filled: Int[Array, ""]


def init_cache(config: ModelConfig, rows: int, slots: int, memory_length: int = 0) -> Cache:
    """An empty cache of `slots` slots (prompt length + steps * hypotheses) for `rows` rows.

    `memory_length` is the length of the encoder's output, if there is one.
    """

    def kv(length: int) -> tuple[KV, ...]:
        shape = (rows, config.kv_heads, length, config.dim_per_head)
        empty = jnp.zeros(shape, config.compute_dtype)
        return (KV(empty, empty),) * config.n_decoder_layers

    crossed = config.n_encoder_layers > 0
    return Cache(
        own=kv(slots),
        cross=kv(memory_length) if crossed else (),
        cross_seg=jnp.zeros((rows, memory_length), jnp.int32) if crossed else None,
        pos=jnp.full((rows, slots), NOWHERE, jnp.int32),
        seen=None,
        filled=jnp.int32(0),
    )


def write(kv: KV, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], at: Array | int) -> KV:
    """`kv` with `k` and `v` in the slots from `at` on."""

    def put(cached: Array, new: Array) -> Array:
        new = new.astype(cached.dtype).swapaxes(1, 2)
        if _narrows(len(cached), cached.shape[2]):  # or XLA would copy it all the same
            return jax.lax.dynamic_update_slice(cached[0], new[0], (0, at, 0))[None]
        return jax.lax.dynamic_update_slice(cached, new, (0, 0, at, 0))

    return KV(put(kv.k, k), put(kv.v, v))


def share_prompt(cache: Cache, width: int) -> Cache:
    """The cache after the prompt, whose slots all `width` hypotheses of a row have seen."""
    if width == 1:
        return cache
    rows, slots = cache.pos.shape
    seen = jnp.broadcast_to((cache.pos != NOWHERE)[:, None], (rows, width, slots))
    return cache._replace(seen=seen)


def follow(cache: Cache, parent: Int[Array, "B W"] | None) -> Cache:
    """The cache before a step in which each hypothesis continues `parent` (None: itself).

    Each takes over the history of its parent, and adds the slot that it is about to write.
    """
    if cache.seen is None:
        return cache
    seen, width = cache.seen, cache.seen.shape[1]
    if parent is not None:
        seen = jnp.take_along_axis(seen, parent[:, :, None], axis=1)
    own = jnp.broadcast_to(jnp.eye(width, dtype=bool), (seen.shape[0], width, width))
    return cache._replace(seen=jax.lax.dynamic_update_slice(seen, own, (0, 0, cache.filled)))


def keep(cache: Cache, fed: int, kept: Int[Array, " B"]) -> Cache:
    """The cache without all but the first `kept` of the last `fed` tokens of each row.

    Slots that no row keeps are free again; width 1 only.
    """
    start = cache.filled - fed
    pos = jax.lax.dynamic_slice_in_dim(cache.pos, start, fed, 1)
    pos = jnp.where(jnp.arange(fed) < kept[:, None], pos, NOWHERE)
    pos = jax.lax.dynamic_update_slice_in_dim(cache.pos, pos, start, 1)
    return cache._replace(pos=pos, filled=start + kept.max())


def narrow(cache: Cache) -> Cache:
    """The cache as a loop should carry it: of one row, without that axis in what steps write. XLA
    removes it to multiply, and on a CPU would copy the whole cache four times a step for it; but
    not where only a part is read.
    """
    if not _narrows(*cache.pos.shape):
        return cache
    return cache._replace(own=jax.tree.map(lambda x: x[0], cache.own))


def widen(cache: Cache) -> Cache:
    """What `narrow` was given."""
    if not _narrows(*cache.pos.shape):
        return cache
    return cache._replace(own=jax.tree.map(lambda x: x[None], cache.own))


def _narrows(rows: int, slots: int) -> bool:
    return rows == 1 and slots < 2 * READ


def repeat(cache: Cache, rows: int, slots: int) -> Cache:
    """A decoder-only model's cache of one row for each of `rows`, with room for `slots` slots."""
    more = slots - cache.pos.shape[1]

    def of_all(x: Array, axis: int, value: int = 0) -> Array:
        room = [(0, more if i == axis else 0) for i in range(x.ndim)]
        padded = jnp.pad(x, room, constant_values=value)
        return jnp.broadcast_to(padded, (rows, *padded.shape[1:]))

    own = jax.tree.map(lambda x: of_all(x, 2), cache.own)
    return cache._replace(own=own, pos=of_all(cache.pos, 1, NOWHERE))


def slide(cache: Cache, first: int, used: Int[Array, ""]) -> Cache:
    """The cache with only the last `used` of its slots from `first` on, which come to stand there.

    For rows to which none of the others belongs.
    """
    by = first + used - cache.filled

    def moved(x: Array, axis: int) -> Array:
        still, rest = jnp.split(x, [first], axis)
        return jnp.concatenate([still, jnp.roll(rest, by, axis)], axis)

    return cache._replace(
        own=jax.tree.map(lambda x: moved(x, 2), cache.own),
        pos=moved(cache.pos, 1),
        seen=None if cache.seen is None else moved(cache.seen, 2),
        filled=jnp.asarray(first + used, jnp.int32),  # no weak type, or what follows compiles twice
    )
