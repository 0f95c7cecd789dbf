"""How a model runs changes nothing it computes: loops, recomputation, compilation, types."""

import dataclasses
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import AS_USERS
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from random_configs import (
    VOCAB,
    batch_for,
    examples,
    logits,
    model_configs,
    random_params,
    random_tokens,
)

from jaxformer.config import ModelConfig
from jaxformer.nn import transformer
from jaxformer.nn.functional import attend
from jaxformer.types import Batch

seeds = st.integers(0, 2**32 - 1)

CONFIG = ModelConfig(
    vocab_size=VOCAB,
    n_decoder_layers=2,
    d_model=8,
    d_ff=12,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    max_length=16,
    gated=True,
    mlp_bias=True,
    window=(0, 3),
    rope_theta=(1e4, 10.0),
)


def batch(config: ModelConfig, seed=0, lengths=(6, 4)) -> Batch:
    rng = np.random.default_rng(seed)
    sides = (random_tokens(rng, 2, 6, lengths) for _ in range(2))
    return batch_for(config, *sides)


def loss(config, params, data):
    out = transformer.apply(config, params, data)
    return jnp.square(out).mean(), out


@partial(jax.jit, static_argnums=0)
def run(config, params, data):
    """Logits, and gradients of their mean square."""
    grads, out = jax.grad(partial(loss, config), has_aux=True)(params, data)
    return out, grads


def assert_close(a, b, rtol=1e-3, atol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


WAYS = (dict(scan_layers=False), dict(remat="full"), dict(remat="dots"))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_loops_and_recomputation_change_nothing(way):
    params, data = random_params(CONFIG, 0), batch(CONFIG)
    out, grads = run(CONFIG, params, data)
    assert_close(run(dataclasses.replace(CONFIG, **way), params, data), (out, grads))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert abs(grad).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_recomputation_drops_the_same_again(remat):
    config = dataclasses.replace(CONFIG, dropout=0.3, attention_dropout=0.3, mlp_dropout=0.3)
    params, data = random_params(CONFIG, 0), batch(CONFIG)

    @partial(jax.jit, static_argnums=0)
    def gradient(config, key):
        def loss(params):
            model = transformer.Transformer(config, deterministic=False)
            return jnp.square(model.apply({"params": params}, data, rngs={"dropout": key})).mean()

        return jax.grad(loss)(params)

    one, other = (gradient(config, jax.random.key(seed)) for seed in (0, 1))
    again = gradient(dataclasses.replace(config, remat=remat), jax.random.key(0))
    assert_close(again, one)
    path = ("decoder", "layers", "mlp", "up", "kernel")
    one, other = (reduce(dict.__getitem__, path, grads) for grads in (one, other))
    assert abs(one - other).max() > 1e-3


def test_recomputation_computes_again():
    """Products that the backward pass repeats: none, attention's two, or the projections too."""

    def products(jaxpr):
        here = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
        inner = (j for eqn in jaxpr.eqns for j in jaxprs_in_params(eqn.params))
        return here + sum(map(products, inner))

    params, data = random_params(CONFIG, 0), batch(CONFIG)
    counts = []
    for remat in ("none", "dots", "full"):
        grad = jax.grad(partial(loss, dataclasses.replace(CONFIG, remat=remat)), has_aux=True)
        counts.append(products(jax.make_jaxpr(grad)(params, data).jaxpr))
    none, dots, full = counts
    assert dots == none + 2
    assert full == dots + 6  # of 7: what the last one gives, its own gradient does not need


@pytest.mark.slow
@examples(10)
@given(model_configs(max_layers=3), seeds)
def test_loops_and_recomputation_change_nothing_in_many_models(config, seed):
    params, data = random_params(config, seed), batch(config, seed)
    wanted = run(config, params, data)
    for way in WAYS + (dict(scan_layers=True),):
        assert_close(run(dataclasses.replace(config, **way), params, data), wanted)


def test_compilation_changes_nothing():
    params, data = random_params(CONFIG, 0), batch(CONFIG)
    with jax.disable_jit():
        eager = transformer.apply(CONFIG, params, data)
    compiled = jax.jit(transformer.apply, static_argnums=0, compiler_options=AS_USERS)
    assert_close(compiled(CONFIG, params, data), eager)


@pytest.mark.slow
@examples(10)
@given(model_configs(), seeds)
def test_compilation_changes_nothing_in_many_models(config, seed):
    params, data = random_params(config, seed), batch(config, seed)
    with jax.disable_jit():
        eager = transformer.apply(config, params, data)
    assert_close(logits(config, params, data), eager)


DTYPES = [
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float32", "float16"),
]


@pytest.mark.slow
@examples(6)
@given(model_configs(max_layers=1), st.sampled_from(DTYPES))
def test_no_type_is_promoted_by_accident(config, dtypes):
    """Forward and backward, traced only."""
    param, compute = dtypes
    config = dataclasses.replace(config, param_dtype=param, compute_dtype=compute)
    with jax.numpy_dtype_promotion("strict"):
        params = jax.eval_shape(lambda: random_params(config, 0))
        grad = jax.grad(partial(loss, config), has_aux=True)
        grads, out = jax.eval_shape(grad, params, batch(config))
    assert out.dtype == jnp.float32
    assert {grad.dtype for grad in jax.tree.leaves(grads)} == {jnp.dtype(param)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_softmax_is_float32_whatever_goes_in(dtype):
    """Every exponential, forward and backward."""

    def exponentials(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("exp", "exp2", "logistic"):
                yield from (x.aval.dtype for x in (*eqn.invars, *eqn.outvars))
            for inner in jaxprs_in_params(eqn.params):
                yield from exponentials(inner)

    x = jnp.ones((2, 5, 4, 6), dtype)
    keys, mask = x[:, :, :2], jnp.ones((2, 5, 5), bool)
    grad = jax.grad(lambda *qkv: attend(*qkv, mask).sum().astype(jnp.float32), (0, 1, 2))
    assert set(exponentials(jax.make_jaxpr(grad)(x, keys, keys).jaxpr)) == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[-1]], ids=str)
def test_narrow_types_are_near_float32(dtypes):
    exact = dataclasses.replace(CONFIG, n_decoder_layers=1)
    narrow = dataclasses.replace(exact, param_dtype=dtypes[0], compute_dtype=dtypes[1])
    params, data = random_params(exact, 0), batch(exact)
    wanted, wanted_grads = run(exact, params, data)
    out, grads = run(narrow, jax.tree.map(lambda x: x.astype(dtypes[0]), params), data)
    assert abs(out - wanted).max() > 0  # it was not float32 after all
    assert_close(out, wanted, rtol=0.1, atol=0.1)
    for grad, exactly in zip(*map(jax.tree.leaves, (grads, wanted_grads)), strict=True):
        error = np.linalg.norm(np.asarray(grad, np.float32) - exactly)
        assert error < 0.1 * np.linalg.norm(exactly) + 0.01


def test_rows_that_see_nothing_have_finite_gradients():
    """Rows: all padding; a target without a source; a source without a target."""
    config = dataclasses.replace(
        CONFIG, n_encoder_layers=1, n_decoder_layers=1, norm="rms", compute_dtype="float16"
    )
    rng = np.random.default_rng(0)
    source, target = (random_tokens(rng, 3, 6, n) for n in ([0, 0, 6], [0, 6, 0]))
    out, grads = run(config, random_params(config, 0), batch_for(config, source, target))
    assert np.isfinite(out).all()
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
