"""What one update does: the same however it is cut up, and nothing at all when it is not finite."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import AS_USERS
from toy_models import LAYERS, toy, toy_batch, toy_params

from jaxformer import sharding
from jaxformer.config import MeshConfig, ModelConfig, OptimConfig
from jaxformer.training.optim import make_optimizer
from jaxformer.training.state import TrainState
from jaxformer.training.step import loss_sums, make_eval_step, train_step

OPTIM = OptimConfig(learning_rate=0.01, schedule="constant", warmup=0, label_smoothing=0.1)


def start(config: ModelConfig) -> TrainState:
    """A state to begin from; its arrays may be donated."""
    params = jax.tree.map(jnp.copy, toy_params(config))
    tx = make_optimizer(config, OPTIM, 100)
    return TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(0))


@cache
def stepper(config: ModelConfig, accumulate: int = 1) -> Callable[..., Any]:
    tx = make_optimizer(config, OPTIM, 100)
    return jax.jit(partial(train_step, config, OPTIM, tx, accumulate))


def bits(tree: Any) -> list[bytes]:
    leaves = jax.tree.leaves(tree)
    data = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]
    return [np.asarray(x).tobytes() for x in data]


def close(a: Any, b: Any, tolerance: float) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), a, b)


CONFIG = toy(norm="rms", position="none")  # few parts, to compile quickly


@pytest.fixture(scope="module")
def step() -> Callable[..., Any]:
    return stepper(CONFIG)


@pytest.mark.parametrize(
    "kind", ["decoder-only", pytest.param("encoder-decoder", marks=pytest.mark.slow)]
)
def test_parts_add_up_to_the_batch(kind):
    config = toy(kind, norm="rms", position="none")
    batch = toy_batch(config)
    parts = np.asarray(batch.weights).reshape(-1, 4, 6).sum((0, 2))
    assert len(set(parts.tolist())) > 1  # or a mean of means would pass
    whole, expected = stepper(config)(start(config), batch)
    state, metrics = stepper(config, 4)(start(config), batch)
    close(metrics, expected, 1e-5)
    close(state.params, whole.params, 1e-5)
    close(state.opt_state, whole.opt_state, 1e-5)


def test_metrics_are_of_the_whole_batch(step):
    batch = toy_batch(CONFIG)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    nll, tokens = make_eval_step(CONFIG, mesh)(toy_params(CONFIG), batch)
    state, metrics = step(start(CONFIG), batch)
    assert metrics.tokens == tokens == np.sum(batch.weights)
    assert metrics.loss == pytest.approx(float(nll / tokens), rel=1e-6)  # not the smoothed loss
    assert metrics.grad_norm > 0 and metrics.skipped == 0 and state.step == 1


def test_is_deterministic(step):
    batch = toy_batch(CONFIG)
    assert bits(step(start(CONFIG), batch)) == bits(step(start(CONFIG), batch))


@pytest.mark.slow
def test_compiled_equals_eager():
    batch, tx = toy_batch(CONFIG), make_optimizer(CONFIG, OPTIM, 100)
    with jax.disable_jit():
        state, metrics = train_step(CONFIG, OPTIM, tx, 1, start(CONFIG), batch)
    update = partial(train_step, CONFIG, OPTIM, tx, 1)
    compiled, expected = jax.jit(update, compiler_options=AS_USERS)(start(CONFIG), batch)
    close(metrics, expected, 1e-5)
    close(state.params, compiled.params, 1e-4)


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", "float32"),
        pytest.param(("float32", "bfloat16"), marks=pytest.mark.slow),
        pytest.param(("bfloat16", "bfloat16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_batch_is_learnt_by_heart(dtypes):
    config = dataclasses.replace(CONFIG, param_dtype=dtypes[0], compute_dtype=dtypes[1])
    batch, state, losses, step = toy_batch(config), start(config), [], stepper(config)
    # What comes next must follow from what came before: count up.
    batch = batch._replace(labels=(batch.target.ids + 1) % 16)
    for _ in range(100):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[0] > 2 and losses[-1] < 0.3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["params", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(step, bad, where):
    state, batch = start(CONFIG), toy_batch(CONFIG)
    state, _ = step(state, batch)  # moments that are not all zero
    if where == "params":
        scale = state.params["decoder"]["final_norm"]["scale"].at[0].set(bad)
        state.params["decoder"]["final_norm"]["scale"] = scale
    else:
        batch = batch._replace(weights=batch.weights.at[0, 0].set(bad))
    before = bits((state.params, state.opt_state))
    after, metrics = step(state, batch)
    assert bits((after.params, after.opt_state)) == before
    assert metrics.skipped == 1 and after.step == 2
    assert bits(after.key) == bits(state.key)


def test_goes_on_after_a_skipped_step(step):
    batch = toy_batch(CONFIG)
    bad = batch._replace(weights=batch.weights * np.nan)
    skipped, _ = step(start(CONFIG), bad)
    after, metrics = step(skipped, batch)
    straight, expected = step(start(CONFIG), batch)
    assert metrics.skipped == 0 and metrics.loss == expected.loss
    assert bits(after.params) == bits(straight.params)


def nothing_to_learn(config: ModelConfig) -> dict[str, Any]:
    batch = toy_batch(config)
    learner = batch.target or batch.source
    empty = learner._replace(ids=learner.ids * 0, pos=learner.pos * 0, seg=learner.seg * 0)
    padding = jax.tree.map(jnp.zeros_like, batch)
    no_target = batch._replace(target=empty) if batch.target else batch._replace(source=empty)
    return {
        "all padding": padding,
        "empty targets": no_target._replace(labels=padding.labels, weights=padding.weights),
        "zero weights": batch._replace(weights=padding.weights),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_to_learn_is_a_loss_of_zero(kind):
    config = toy(kind, norm="rms", position="none")
    step = stepper(config)
    for batch in nothing_to_learn(config).values():
        state, metrics = step(start(config), batch)
        assert (metrics.loss, metrics.tokens, metrics.grad_norm, metrics.skipped) == (0, 0, 0, 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
        # The gradient is exactly zero; only the decay moves anything.
        assert all(not np.any(leaf) for leaf in moments(state))


def moments(state: TrainState) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]


@pytest.mark.slow
def test_empty_rows_change_nothing(step):
    batch = toy_batch(CONFIG)
    longer = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), batch)
    state, metrics = step(start(CONFIG), batch)
    padded, same = step(start(CONFIG), longer)
    close(metrics, same, 1e-5)
    close(state.params, padded.params, 1e-5)


def test_dropout_differs_by_step_and_by_part():
    config = toy(norm="rms", position="none", dropout=0.5)
    step = stepper(config, 2)
    one = jax.tree.map(lambda x: x[:1], toy_batch(config))
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), one)
    losses = [step(start(config)._replace(step=jnp.int32(i)), twice)[1].loss for i in (0, 0, 1, 2)]
    assert losses[0] == losses[1] and len(set(map(float, losses))) == 3
    other = start(config)._replace(key=jax.random.key(1))
    assert step(other, twice)[1].loss != losses[0]
    # Two equal parts: with one key for both, this would be the loss of the first alone.
    loss = jax.jit(lambda key: loss_sums(config, OPTIM, toy_params(config), one, key)[1])
    keys = jax.random.split(jax.random.fold_in(start(config).key, 0), 2)
    first, second = (float(loss(key)) / 6 for key in keys)
    assert first != second
    assert losses[0] == pytest.approx((first + second) / 2, rel=1e-5)
