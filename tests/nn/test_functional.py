"""Each function equals its formula, written out again in plain numpy."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxformer.nn import functional as f
from jaxformer.types import NOWHERE

attend = jax.jit(f.attend, static_argnames=("cap", "drop"))
rng = np.random.default_rng(0)
close = dict(rtol=1e-5, atol=1e-5)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


def test_layer_norm():
    x, scale, bias = normal(2, 3, 5) * 3 + 1, normal(5), normal(5)
    wanted = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    x, scale, bias = map(jnp.asarray, (x, scale, bias))
    np.testing.assert_allclose(f.layer_norm(x, scale, None, 0.1), wanted * scale, **close)
    np.testing.assert_allclose(f.layer_norm(x, scale, bias, 0.1), wanted * scale + bias, **close)


def test_rms_norm():
    x, scale = normal(2, 3, 5) * 3 + 1, normal(5)
    wanted = x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(f.rms_norm(jnp.array(x), jnp.array(scale), 0.1), wanted, **close)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_compute_in_float32(dtype):
    """Squares of these overflow float16, and their mean is lost in bfloat16."""
    x = jnp.array(500 + normal(4, 64), dtype)
    ones = jnp.ones(64, dtype)
    wide = np.asarray(x, np.float64)
    for got, wanted in [
        (f.layer_norm(x, ones, ones * 0, 1e-6), (wide - wide.mean(-1, keepdims=True))
         / wide.std(-1, keepdims=True)),
        (f.rms_norm(x, ones, 1e-6), wide / np.sqrt((wide**2).mean(-1, keepdims=True))),
    ]:  # fmt: skip
        assert got.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0.01, atol=0.01)


def test_softcap():
    x = normal(7) * 10
    np.testing.assert_allclose(f.softcap(jnp.array(x), 3.0), 3 * np.tanh(x / 3), **close)
    np.testing.assert_array_equal(f.softcap(jnp.array(x), 0.0), x)


def test_activations():
    x = normal(50) * 3
    wanted = {
        "relu": np.maximum(x, 0),
        "gelu": x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
        "gelu_tanh": x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "silu": x / (1 + np.exp(-x)),
    }
    assert set(f.ACTIVATIONS) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(
            f.ACTIVATIONS[name](jnp.array(x)), values, rtol=1e-4, atol=1e-6, err_msg=name
        )
    assert abs(wanted["gelu"] - wanted["gelu_tanh"]).max() > 1e-4  # so that the test can tell


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("cap", "biased"), [(0.0, False), (2.0, True)])
def test_attend(heads, kv_heads, cap, biased):
    """Query head n reads key head n // (N / K); the cap comes before the bias."""
    query, key, value = normal(2, 3, heads, 4), normal(2, 5, kv_heads, 4), normal(2, 5, kv_heads, 4)
    mask, bias = rng.random((2, 3, 5)) < 0.6, normal(2, heads, 3, 5)
    mask[..., 0] = True
    wanted = np.zeros((2, 3, heads, 4))
    for b, t, n in np.ndindex(2, 3, heads):
        k = n // (heads // kv_heads)
        scores = {}
        for s in range(5):
            score = float(np.dot(query[b, t, n], key[b, s, k]))
            score = cap * np.tanh(score / cap) if cap else score
            score += bias[b, n, t, s] if biased else 0
            if mask[b, t, s]:
                scores[s] = np.exp(score)
        for s, score in scores.items():
            wanted[b, t, n] += score / sum(scores.values()) * value[b, s, k]
    got = attend(
        *map(jnp.asarray, (query, key, value, mask)), jnp.array(bias) if biased else None, cap=cap
    )
    np.testing.assert_allclose(got, wanted, **close)


def test_attend_broadcasts_mask_and_bias_over_rows():
    query, key, value = (jnp.array(normal(2, 3, 2, 4)) for _ in range(3))
    mask, bias = jnp.tril(jnp.ones((1, 3, 3), bool)), jnp.array(normal(1, 2, 3, 3))
    one = attend(query, key, value, mask, bias)
    both = attend(query, key, value, jnp.tile(mask, (2, 1, 1)), jnp.tile(bias, (2, 1, 1, 1)))
    np.testing.assert_array_equal(one, both)


def test_the_least_of_scores_is_more_than_a_masked_one():
    query, value = jnp.array([[[[-3e4]]]]), jnp.array([[[[1.0]], [[2.0]]]])
    mask = jnp.array([[[True, False]]])
    assert float(attend(query, jnp.ones((1, 2, 1, 1)), value, mask)[0, 0, 0, 0]) == 1


def test_dropped_weights_drop_values():
    query, key, value = (jnp.array(normal(1, 2, 1, 4)) for _ in range(3))
    mask = jnp.ones((1, 2, 2), bool)
    got = attend(query, key, value, mask, drop=lambda w: w.at[..., 1].set(0))
    weight = jax.nn.softmax(query[0, :, 0] @ key[0, :, 0].T)[:, :1]
    np.testing.assert_allclose(got[0, :, 0], weight * value[0, 0], **close)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_that_sees_nothing_is_finite(dtype):
    query, key, value = (jnp.array(normal(1, 2, 2, 4) * 30, dtype) for _ in range(3))
    mask = jnp.array([[[False, False], [True, False]]])
    bias = jnp.full((1, 2, 2, 2), -1e9)

    def total(*args):
        out = f.attend(*args, mask, bias)
        assert out.dtype == dtype
        return out.astype(jnp.float32).sum()

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    out, grads = run(query, key, value)
    assert jnp.isfinite(out)
    assert all(jnp.isfinite(grad).all() for grad in grads)


ROWS, QUERIES, KEYS = 2, 4, 5
positions = st.integers(0, 6)


@settings(max_examples=30)
@given(
    arrays(np.int32, (ROWS, QUERIES), elements=positions),
    arrays(np.int32, (ROWS, KEYS), elements=positions | st.just(NOWHERE)),
    arrays(np.int32, (ROWS, QUERIES), elements=st.integers(0, 2)),
    arrays(np.int32, (ROWS, KEYS), elements=st.integers(0, 2)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 4),
)
def test_attention_mask(q_pos, kv_pos, q_seg, kv_seg, segments, causal, window):
    wanted = np.zeros((ROWS, QUERIES, KEYS), bool)
    for b, t, s in np.ndindex(wanted.shape):
        q, kv = int(q_pos[b, t]), int(kv_pos[b, s])
        wanted[b, t, s] = (
            (not causal or kv <= q)
            and (not segments or q_seg[b, t] == kv_seg[b, s])
            and (not window or abs(q - kv) < window)
        )
    segs = (jnp.array(q_seg), jnp.array(kv_seg)) if segments else ()
    got = f.attention_mask(jnp.array(q_pos), jnp.array(kv_pos), *segs, causal=causal, window=window)
    np.testing.assert_array_equal(np.broadcast_to(got, wanted.shape), wanted)


@pytest.mark.parametrize("rows", [1, 2, f.FEW, f.FEW + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_projected_alike_however_many(rows, dtype):
    x, weight = jnp.asarray(normal(rows, 5), dtype), jnp.asarray(normal(7, 5), dtype)
    found = f.project(x, weight, jnp.float32)
    np.testing.assert_array_equal(found, f.project(x, weight, jnp.float32, on_cpu=True))
    wanted = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
    assert found.dtype == jnp.float32 and found.shape == (rows, 7)
    np.testing.assert_allclose(found, wanted, **close)


@pytest.mark.parametrize("slots", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("cap, biased, few", [(0.0, True, f.FEW), (2.0, False, 1)])
def test_a_cache_is_read_as_far_as_it_is_filled(slots, cap, biased, few, monkeypatch):
    monkeypatch.setattr(f, "READ", 4)
    monkeypatch.setattr(f, "FEW", few)
    query, key, value = normal(2, 3, 4, 5), normal(2, slots, 2, 5), normal(2, slots, 2, 5)
    bias = jnp.asarray(normal(2, 4, 3, slots)) if biased else None
    cached = jax.jit(partial(f.attend_cached, cap=cap))
    for filled in {1, slots // 2 + 1, slots}:
        mask = jnp.asarray((rng.random((2, 3, slots)) < 0.7) & (np.arange(slots) < filled))
        mask = mask.at[..., 0].set(True)
        wanted = attend(*map(jnp.asarray, (query, key, value)), mask, bias, cap=cap)
        beyond = np.where(np.arange(slots)[:, None, None] < filled, 0, 1e30)  # it may be anything
        k, v = key + beyond, value + np.where(beyond > 0, 9, 0)
        layout = [jnp.asarray(x.swapaxes(1, 2), "float32") for x in (k, v)]
        found = cached(query, *layout, mask, bias, filled=jnp.int32(filled))
        np.testing.assert_allclose(found, wanted, **close)
        whole = cached(query, *layout, mask, bias)
        np.testing.assert_allclose(whole, wanted, **close)


def test_what_is_not_filled_is_not_read(monkeypatch):
    monkeypatch.setattr(f, "READ", 4)
    query, key, value = normal(1, 1, 2, 4), normal(1, 2, 16, 4), normal(1, 2, 16, 4)
    value[:, :, 4:] = np.nan  # which would spoil a sum, weighed with 0 or not
    mask = jnp.arange(16)[None, None] < 3
    read = partial(f.attend_cached, *map(jnp.asarray, (query, key, value)), mask)
    assert np.isfinite(read(filled=jnp.int32(4))).all()
    assert np.isnan(read(filled=jnp.int32(5))).all() and np.isnan(read()).all()
