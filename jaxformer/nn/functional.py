"""The mathematics of a layer, as plain functions on arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

READ = 128
"""Slots of a cache that are read together, at least."""
FEW = 64
"""Rows up to which a product on a CPU is bound by reading its other factor."""
MASKED = -1e9
"""Logit of what may not be attended to: finite, so that a row with nothing to see is no NaN."""


def layer_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    eps: float,
) -> Float[Array, "... D"]:
    """Layer normalisation, computed in float32 (Ba et al. 2016)."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * scale.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float
) -> Float[Array, "... D"]:
    """Root-mean-square normalisation, computed in float32 (Zhang and Sennrich 2019)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * scale.astype(jnp.float32)
    return y.astype(x.dtype)


def softcap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Squash `x` smoothly into (-cap, cap): cap * tanh(x / cap); a cap of 0 leaves it.

    >>> float(softcap(jnp.array(1e6), 30.0))
    30.0
    """
    return cap * jnp.tanh(x / cap) if cap else x


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def project(
    x: Float[Array, "*B I"], weight: Float[Array, "O I"], dtype: Any, on_cpu: bool = False
) -> Float[Array, "*B O"]:
    """x W^T, in `dtype`, in the form that is fastest for so many rows.

    `on_cpu`: the caller knows that this runs on a CPU, and no other form need be traced.
    """

    def straight(x: Array, weight: Array) -> Array:
        return jnp.matmul(x, weight.T, preferred_element_type=dtype)

    def turned(x: Array, weight: Array) -> Array:
        # XLA would fold the transposes into the product, and lose by it.
        y = jnp.matmul(weight, x.T, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y).T

    rows = x.reshape(-1, x.shape[-1])
    y = _product(len(rows), straight, turned, rows, weight, on_cpu=on_cpu)
    return y.reshape(*x.shape[:-1], -1)


def _product(
    rows: int,
    straight: Callable[..., Array],
    turned: Callable[..., Array],
    *factors: Array,
    on_cpu: bool = False,
) -> Array:
    """A product of so many rows with a larger factor: on a CPU, if they are few, `turned`."""
    if rows > FEW:
        return straight(*factors)
    if on_cpu:
        return turned(*factors)
    return jax.lax.platform_dependent(*factors, cpu=turned, default=straight)


def attention_mask(
    q_pos: Int[Array, "#B T"],
    kv_pos: Int[Array, "#B S"],
    q_seg: Int[Array, "#B T"] | None = None,
    kv_seg: Int[Array, "#B S"] | None = None,
    *,
    causal: bool = True,
    window: int = 0,
) -> Bool[Array, "#B T S"]:
    """Which keys each query may attend to, from positions and segments.

    Causal: none later than itself, which also hides padding and empty slots of a cache, whose
    position there is later than all. Segments: only keys of the query's own. Window: only keys
    nearer than `window` positions; 0 is no limit.

    >>> pos = jnp.arange(3)[None]
    >>> attention_mask(pos, pos, window=2)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    q, kv = q_pos[:, :, None], kv_pos[:, None, :]
    allowed = q >= kv if causal else jnp.ones((1, q.shape[1], kv.shape[2]), bool)
    if q_seg is not None and kv_seg is not None:
        allowed &= q_seg[:, :, None] == kv_seg[:, None, :]
    if window:
        allowed &= jnp.abs(q - kv) < window
    return allowed


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B N T S"] | None = None,
    *,
    cap: float = 0.0,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with N / K query heads to each key head; `query` comes scaled.

    Logits and softmax are float32 whatever the inputs. `drop` is applied to the weights.
    Multi-head: Vaswani et al. 2017, equation 1; grouped: Ainslie et al. 2023.
    """
    b, t, n, h = query.shape
    k = key.shape[2]
    q = query.reshape(b, t, k, n // k, h)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, key, preferred_element_type=jnp.float32)
    weights = drop(_weights(logits, mask, bias, cap).astype(value.dtype))
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(b, t, n, h)


def _weights(
    logits: Float[Array, "B K G T S"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B N T S"] | None,
    cap: float,
) -> Float[Array, "B K G T S"]:
    """How much each query attends to each key."""
    logits = softcap(logits, cap)
    if bias is not None:
        logits = logits + bias.reshape(bias.shape[0], *logits.shape[1:3], *bias.shape[2:])
    return jax.nn.softmax(jnp.where(mask[:, None, None], logits, MASKED), axis=-1)


def attend_cached(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B N T S"] | None = None,
    *,
    cap: float = 0.0,
    filled: Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` to a cache in its own layout, of which at least the first `filled` slots are read.

    What is read grows by fours from `READ`, so that a token costs what the cache holds, not what
    it could hold; None reads all.
    """
    b, t, n, h = query.shape
    k, slots = key.shape[1:3]
    q = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)

    def straight(q: Array, key: Array) -> Array:
        return jnp.einsum("bkgth,bksh->bkgts", q, key, preferred_element_type=jnp.float32)

    def turned(q: Array, key: Array) -> Array:  # as in `project`
        y = jnp.einsum("bksh,bkgth->bksgt", key, q, preferred_element_type=jnp.float32)
        return jnp.moveaxis(jax.lax.optimization_barrier(y), 2, -1)

    def read(size: int) -> Float[Array, "B K G T H"]:
        # Each key meets so many queries: those of its group, at each of the t places.
        logits = _product(n // k * t, straight, turned, q, key[:, :, :size])
        near = None if bias is None else bias[..., :size]
        weights = _weights(logits, mask[..., :size], near, cap).astype(value.dtype)
        return jnp.einsum("bkgts,bksh->bkgth", weights, value[:, :, :size])

    sizes = [slots]
    while filled is not None and sizes[0] >= 2 * READ:
        sizes.insert(0, max(READ, sizes[0] // 4 // READ * READ))
    if len(sizes) == 1:
        y = read(slots)
    else:
        enough = jnp.searchsorted(jnp.array(sizes), jnp.asarray(filled))
        y = jax.lax.switch(enough, [lambda size=size: read(size) for size in sizes])
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
