"""The largest entries of a row, found fast on every backend."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

CHUNK = 128
LARGE = 4096


def argmax(x: Float[Array, "... V"]) -> Int[Array, "..."]:
    """Index of the largest entry, the lowest one on ties."""
    # A maximum and a minimum vectorise; XLA's own argmax, a reduction of pairs, does not.
    ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    # Not fused with what follows, or XLA writes the maximum out as wide as x.
    largest = jax.lax.optimization_barrier(x.max(-1, keepdims=True))
    first = jnp.where(x == largest, ids, x.shape[-1]).min(-1)
    return jnp.minimum(first, x.shape[-1] - 1)


def top_k(x: Float[Array, "... V"], k: int) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """The k largest entries in falling order and their indices, the lower index first on ties.

    Equal to `jax.lax.top_k`, with less to sort in long rows: an entry among the k largest lies in
    one of the k chunks with the largest maxima, so only those are searched.
    """
    size = x.shape[-1]
    if size < LARGE or size <= CHUNK * k:
        values, index = jax.lax.top_k(x, k)
        return values, index
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -size % CHUNK)]
    chunks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(*x.shape[:-1], -1, CHUNK)
    _, best = jax.lax.top_k(chunks.max(-1), k)
    best = jnp.sort(best, -1)  # so that ties between chunks go to the lower index too
    rows = jnp.take_along_axis(chunks, best[..., None], -2)
    values, at = jax.lax.top_k(rows.reshape(*x.shape[:-1], -1), k)
    return values, jnp.take_along_axis(best, at // CHUNK, -1) * CHUNK + at % CHUNK
