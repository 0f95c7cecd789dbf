"""The loss against optax and plain numpy, and where there is nothing to learn from."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import LAYERS, toy, toy_batch, toy_params

from jaxformer.config import OptimConfig
from jaxformer.training.loss import cross_entropy
from jaxformer.training.step import loss_sums

shapes = st.sampled_from([(1, 1, 1), (2, 3, 7), (3, 0, 5)])  # each is compiled
shares = st.sampled_from([0.0, 0.1, 0.9])


def by_hand(logits: np.ndarray, labels: np.ndarray, smoothing: float, z_loss: float) -> np.ndarray:
    """The definition, in float64, from normalised probabilities."""
    logits = logits.astype(np.float64)
    z = np.exp(logits).sum(-1)
    targets = np.eye(logits.shape[-1])[labels] * (1 - smoothing) + smoothing / logits.shape[-1]
    return -(targets * np.log(np.exp(logits) / z[..., None])).sum(-1) + z_loss * np.log(z) ** 2


@settings(max_examples=30)
@given(shapes, shares, shares, st.integers(0, 9))
def test_is_its_definition(shape, smoothing, z_loss, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, shape).astype(np.float32)
    labels = rng.integers(0, shape[-1], shape[:2]).astype(np.int32)
    objective, nll = cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing, z_loss=z_loss
    )
    expected = by_hand(logits, labels, smoothing, z_loss)
    np.testing.assert_allclose(objective, expected, rtol=1e-5, atol=1e-5)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(nll, plain, rtol=1e-5, atol=1e-5)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, shape[-1]), smoothing)
    smoothed = optax.softmax_cross_entropy(logits, smooth)
    z = z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    np.testing.assert_allclose(objective, smoothed + z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padding_of_the_vocabulary_changes_nothing(smoothing):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (2, 3, 7)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 7, (2, 3)), jnp.int32)

    def loss(logits, padding):
        padded = jnp.pad(logits, ((0, 0), (0, 0), (0, padding)), constant_values=-jnp.inf)
        options = dict(label_smoothing=smoothing, z_loss=0.1, vocab_padding=padding)
        return cross_entropy(padded, labels, **options)[0].sum()

    (plain, grad), (padded, padded_grad) = (
        jax.value_and_grad(loss)(logits, padding) for padding in (0, 3)
    )
    np.testing.assert_allclose(padded, plain, rtol=1e-6)
    np.testing.assert_allclose(padded_grad, grad, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    for label, expected in [(0, 0.0), (1, 1e4), (2, 2e4)]:
        labels = jnp.array([[label]])
        (objective, nll), grad = jax.value_and_grad(
            lambda x, labels=labels: tuple(part.sum() for part in cross_entropy(x, labels)),
            has_aux=True,
        )(logits)
        assert objective == nll == expected
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_only_weighted_tokens_count(kind):
    config = toy(kind)
    batch = toy_batch(config)
    params = toy_params(config)
    optim = OptimConfig(label_smoothing=0.1, z_loss=0.1)

    @partial(jax.jit, static_argnums=0)
    def loss(optim, batch):
        return loss_sums(config, optim, params, batch)

    objective, nll = loss(optim, batch)
    other = batch._replace(labels=jnp.where(batch.weights > 0, batch.labels, 3))
    assert loss(optim, other) == (objective, nll)
    double, _ = loss(optim, batch._replace(weights=2 * batch.weights))
    np.testing.assert_allclose(double, 2 * objective, rtol=1e-6)
    assert loss(OptimConfig(), batch)[0] == nll != objective
