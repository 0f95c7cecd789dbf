"""How positions enter a Transformer: added, rotated into queries and keys, or as a bias."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.config import ModelConfig


def sinusoid(pos: Int[Array, "B T"], width: int, *, halves: bool = False) -> Float[Array, "B T D"]:
    """Fixed sine (even columns) and cosine (odd) embeddings (Vaswani et al. 2017, section 3.5).

    With `halves` all sines come first.
    """
    rate = 10000.0 ** (-np.arange(0, width, 2) / width)
    angle = pos[..., None].astype(jnp.float32) * rate.astype(np.float32)
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-2 if halves else -1)
    return waves.reshape(*pos.shape, -1)[..., :width]


def rotary_rates(config: ModelConfig, theta: float, factor: float) -> Float[np.ndarray, "h"]:
    """Radians per position of each pair of rotated dimensions, wavelengths stretched by `factor`.

    All alike (Chen et al. 2023), or only those that are long against the context the model was
    first trained for, with a ramp between (Llama 3.1, Grattafiori et al. 2024).

    >>> config = ModelConfig(n_decoder_layers=1, d_model=8, n_heads=2)
    >>> rotary_rates(config, 10000.0, 1.0).tolist(), rotary_rates(config, 10000.0, 2.0).tolist()
    ([1.0, 0.01], [0.5, 0.005])
    """
    rate = theta ** (-np.arange(0, config.rotated, 2) / config.rotated)
    if config.rope_divisors:
        rate = rate / np.array(config.rope_divisors)
    if config.rope_scaling == "linear":
        return rate / factor
    turns = config.rope_original_length * rate / (2 * np.pi)  # over the first context
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * rate + (1 - kept) * rate / factor


def rotation(
    pos: Int[Array, "B T"], rates: Float[np.ndarray, "h"], magnitude: float = 1.0
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Cosines and sines that `rotate` takes, for h pairs of dimensions, times `magnitude`."""
    angle = pos[..., None, None].astype(jnp.float32) * rates.astype(np.float32)
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "#B T 1 h"],
    sin: Float[Array, "#B T 1 h"],
) -> Float[Array, "B T N H"]:
    """Rotary position embedding of queries or keys (Su et al. 2021).

    Of the first 2h dimensions the halves are paired and rotated; any others are left alone.
    """
    h = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), [h, 2 * h], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


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
