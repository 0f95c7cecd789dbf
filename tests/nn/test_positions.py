"""Positions: the papers' formulas, and the properties they were made for."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.config import ModelConfig
from jaxformer.nn import positions
from jaxformer.types import NOWHERE

rng = np.random.default_rng(0)


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoid_is_the_papers(width):
    pos = np.array([[0, 1, 5], [400, 2, 3]])
    wanted = np.zeros((2, 3, width))
    for b, t, column in np.ndindex(wanted.shape):
        angle = pos[b, t] / 10000 ** (column // 2 * 2 / width)
        wanted[b, t, column] = math.cos(angle) if column % 2 else math.sin(angle)
    got = positions.sinusoid(jnp.array(pos), width)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def rates(head_dim, theta, factor=1.0, **options):
    config = ModelConfig(n_decoder_layers=1, n_heads=1, head_dim=head_dim, **options)
    return positions.rotary_rates(config, theta, factor)


def test_halves_are_the_same_waves_in_another_order():
    pos = jnp.array([[0, 1, 7]])
    mixed, halves = (positions.sinusoid(pos, 8, halves=h) for h in (False, True))
    np.testing.assert_array_equal(halves, np.concatenate([mixed[..., ::2], mixed[..., 1::2]], -1))


def test_llama3_stretches_long_waves_only():
    options = dict(rope_scaling="llama3", rope_original_length=64)
    plain, stretched = rates(32, 1e4), rates(32, 1e4, 8.0, **options)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 64 / 4, wavelength > 64
    assert short.any() and long.any() and not (short | long).all()
    np.testing.assert_array_equal(stretched[short], plain[short])
    np.testing.assert_array_equal(stretched[long], plain[long] / 8)
    between = stretched[~(short | long)] / plain[~(short | long)]
    assert ((between > 1 / 8) & (between < 1)).all()


def test_rotary_dim_leaves_the_rest_alone():
    x = jnp.array(rng.normal(size=(1, 3, 2, 10)), jnp.float32)
    pos = jnp.array([[0, 4, 9]])
    part = rates(10, 1e4, rotary_dim=6)
    got = positions.rotate(x, *positions.rotation(pos, part))
    np.testing.assert_array_equal(got[..., 6:], x[..., 6:])
    wanted = positions.rotate(x[..., :6], *positions.rotation(pos, rates(6, 1e4)))
    np.testing.assert_array_equal(got[..., :6], wanted)


def test_divisors_and_magnitude():
    divisors = (1.0, 2.0, 4.0)
    got = rates(6, 1e4, rope_divisors=divisors)
    np.testing.assert_allclose(got, rates(6, 1e4) / np.array(divisors))
    pos = jnp.array([[3]])
    cos, sin = positions.rotation(pos, got, 1.5)
    plain_cos, plain_sin = positions.rotation(pos, got)
    np.testing.assert_allclose(cos, 1.5 * plain_cos)
    np.testing.assert_allclose(sin, 1.5 * plain_sin)


def rotated(x, pos, theta):
    pos = jnp.full((1, 1), pos)
    cos, sin = positions.rotation(pos, rates(x.shape[-1], theta))
    return np.asarray(positions.rotate(jnp.array(x)[None, None, None], cos, sin))[0, 0, 0]


@settings(max_examples=30)
@given(
    st.integers(0, 200), st.integers(0, 200), st.integers(1, 300), st.sampled_from([1e4, 5e5, 10.0])
)
def test_rotary_products_depend_on_distance_alone(q_pos, kv_pos, shift, theta):
    query, key = rng.normal(size=(2, 8)).astype(np.float32)
    here = rotated(query, q_pos, theta) @ rotated(key, kv_pos, theta)
    there = rotated(query, q_pos + shift, theta) @ rotated(key, kv_pos + shift, theta)
    np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        np.linalg.norm(rotated(query, q_pos, theta)), np.linalg.norm(query), rtol=1e-5
    )


def test_rotation_is_the_papers():
    """Component i and i + H / 2 turn by pos * theta ** (-2 i / H)."""
    x, pos, theta = rng.normal(size=8).astype(np.float32), 5, 100.0
    wanted = np.zeros(8)
    for i in range(4):
        turn = np.exp(1j * pos * theta ** (-2 * i / 8)) * complex(x[i], x[i + 4])
        wanted[i], wanted[i + 4] = turn.real, turn.imag
    np.testing.assert_allclose(rotated(x, pos, theta), wanted, rtol=1e-5, atol=1e-5)


def test_rotation_takes_each_rows_own_positions():
    x = jnp.array(rng.normal(size=(2, 3, 2, 4)), jnp.float32)
    pos = np.array([[0, 1, 2], [7, 0, 3]])
    got = positions.rotate(x, *positions.rotation(jnp.array(pos), rates(4, 1e4)))
    for b, t, n in np.ndindex(2, 3, 2):
        wanted = rotated(np.asarray(x[b, t, n]), int(pos[b, t]), 1e4)
        np.testing.assert_allclose(got[b, t, n], wanted, rtol=1e-4, atol=1e-5)


def slow_bucket(distance, bidirectional, buckets, longest):
    """The bucket of a key `distance` after its query: a table, filled from near to far."""
    behind = -distance
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if behind < 0 else 0
        behind = abs(behind)
    behind = max(behind, 0)
    exact = buckets // 2
    if behind < exact:
        return offset + behind
    rest = buckets - exact
    # Logarithmic bucket j starts at exact * (longest / exact) ** (j / rest): compared as integers.
    starts = [j for j in range(rest) if behind**rest * exact**j >= longest**j * exact**rest]
    return offset + exact + max(starts)


@pytest.mark.parametrize(
    ("buckets", "longest"), [(32, 128), (8, 20), (7, 30), (4, 6), (64, 256), (32, 1000)]
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets(buckets, longest, bidirectional):
    distance = np.arange(-1100, 1101)
    got = positions.relative_bucket(
        jnp.array(distance), bidirectional=bidirectional, buckets=buckets, max_distance=longest
    )
    wanted = [slow_bucket(int(d), bidirectional, buckets, longest) for d in distance]
    np.testing.assert_array_equal(got, wanted)
    # An empty slot is far away, but it has a bucket.
    nowhere = positions.relative_bucket(
        jnp.array([NOWHERE]), bidirectional=bidirectional, buckets=buckets, max_distance=longest
    )
    assert 0 <= int(nowhere[0]) < buckets


def slow_slopes(heads):
    """As the paper says, in words: for n = 8, 1/2, 1/4 ... 1/256; and so on for other powers."""
    if math.log2(heads).is_integer():
        start = 2.0 ** (-8 / heads)
        return [start ** (i + 1) for i in range(heads)]
    power = max(2**i for i in range(10) if 2**i < heads)
    return slow_slopes(power) + slow_slopes(2 * power)[0::2][: heads - power]


@pytest.mark.parametrize("heads", range(1, 34))
def test_alibi_slopes(heads):
    np.testing.assert_allclose(positions.alibi_slopes(heads), slow_slopes(heads), rtol=1e-6)


def test_alibi_bias():
    q_pos, kv_pos = np.array([[3, 4]]), np.array([[0, 4, 9]])
    got = positions.alibi_bias(jnp.array(q_pos), jnp.array(kv_pos), 3)
    assert got.shape == (1, 3, 2, 3)
    for n, t, s in np.ndindex(3, 2, 3):
        wanted = -slow_slopes(3)[n] * abs(q_pos[0, t] - kv_pos[0, s])
        np.testing.assert_allclose(got[0, n, t, s], wanted, rtol=1e-6)
