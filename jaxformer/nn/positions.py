"""How positions enter a Transformer: added, rotated into queries and keys, or as a bias."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def sinusoid(pos: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Fixed sine (even columns) and cosine (odd) embeddings (Vaswani et al. 2017, section 3.5)."""
    rate = 10000.0 ** (-np.arange(0, width, 2) / width)
    angle = pos[..., None].astype(jnp.float32) * rate.astype(np.float32)
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return waves.reshape(*pos.shape, -1)[..., :width]


def rotation(
    pos: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Cosines and sines that `rotate` takes, h = head_dim / 2 wavelengths from 2 pi to theta's."""
    rate = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = pos[..., None, None].astype(jnp.float32) * rate.astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "#B T 1 h"],
    sin: Float[Array, "#B T 1 h"],
) -> Float[Array, "B T N H"]:
    """Rotary position embedding of queries or keys, the halves of H paired (Su et al. 2021)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def relative_bucket(
    distance: Int[Array, "..."], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """T5's bucket of a key at `distance` = its position - the query's (Raffel et al. 2020, 2.1).

    Half of the buckets hold one distance each, the others grow logarithmically up to
    `max_distance`. Bidirectional: one half for each sign; else later keys share bucket 0.

    >>> d = jnp.array([0, -1, -8, -200, 5])
    >>> relative_bucket(d, bidirectional=False, buckets=32, max_distance=128).tolist()
    [0, 1, 8, 31, 0]
    """
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    far = exact + (ratio / np.log(max_distance / exact) * (buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def alibi_slopes(heads: int) -> Float[np.ndarray, "N"]:
    """Slopes of ALiBi: 2**(-8 i / heads); other counts than powers of two interleave the next's.

    Press et al. 2022.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """

    def geometric(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    power = 2 ** int(np.log2(heads))
    slopes = np.concatenate([geometric(power), geometric(2 * power)[::2][: heads - power]])
    return slopes.astype(np.float32)


def alibi_bias(
    q_pos: Int[Array, "#B T"], kv_pos: Int[Array, "#B S"], heads: int
) -> Float[Array, "#B N T S"]:
    """Attention bias that falls linearly with distance (Press et al. 2022)."""
    distance = jnp.abs(q_pos[:, :, None] - kv_pos[:, None, :]).astype(jnp.float32)
    return -jnp.asarray(alibi_slopes(heads))[None, :, None, None] * distance[:, None]
