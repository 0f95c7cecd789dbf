"""Fast selection equals the plain one, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.decoding import select


@pytest.mark.parametrize(("size", "k"), [(4096, 8), (5000, 1), (5000, 16), (4100, 33), (300, 8)])
def test_top_k_equals_lax(size, k):
    fast, plain = jax.jit(lambda x: select.top_k(x, k)), jax.jit(lambda x: jax.lax.top_k(x, k))

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 50, 10**6]), st.booleans())
    def check(seed, levels, forbid):
        rng = np.random.default_rng(seed)
        x = rng.integers(0, levels, (2, 3, size)).astype(np.float32)
        if forbid:  # fewer than k left in some rows
            x = np.where(rng.random(x.shape) < 0.999, -np.inf, x)
        for got, wanted in zip(fast(x), plain(x), strict=True):
            np.testing.assert_array_equal(got, wanted)

    check()


def test_long_rows_are_not_sorted_whole():
    """The point of the chunks: nothing longer than k chunks or their maxima is searched."""
    jaxpr = jax.make_jaxpr(lambda x: select.top_k(x, 4))(jnp.zeros((1, 32128)))
    searched = [e.invars[0].aval.shape[-1] for e in jaxpr.eqns if e.primitive.name == "top_k"]
    assert searched and max(searched) <= 4 * select.CHUNK


@given(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 2.0]), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_argmax_takes_the_lowest_of_equals(row):
    assert select.argmax(jnp.array([row])).tolist() == [int(np.argmax(row))]


def test_argmax_stays_in_range():
    assert select.argmax(jnp.full((2, 5), jnp.nan)).max() < 5
