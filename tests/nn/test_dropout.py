"""Dropout is random by its key, keeps the mean, and is off unless training asks for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from random_configs import QUICK, VOCAB, batch_for, random_params, random_tokens

from jaxformer.config import ModelConfig
from jaxformer.nn.attention import Attention
from jaxformer.nn.layers import MLP
from jaxformer.nn.transformer import Transformer

OFF = ModelConfig(vocab_size=VOCAB, n_decoder_layers=2, d_model=8, d_ff=8, n_heads=2, max_length=16)
ON = dataclasses.replace(OFF, dropout=0.4, attention_dropout=0.4, mlp_dropout=0.4)
TOKENS = random_tokens(np.random.default_rng(0), 2, 6)
PARAMS, BATCH = random_params(OFF, 0), batch_for(OFF, TOKENS, TOKENS)


def run(config, key, deterministic=False):
    rngs = None if key is None else {"dropout": jax.random.key(key)}
    with jax.disable_jit():
        model = Transformer(config, deterministic)
        return model.apply({"params": PARAMS}, BATCH, rngs=rngs)


def test_dropout_is_off_unless_it_is_asked_for():
    plain = run(OFF, None, deterministic=True)
    np.testing.assert_array_equal(run(ON, None, deterministic=True), plain)
    np.testing.assert_array_equal(run(OFF, 0), plain)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "mlp_dropout"])
def test_each_dropout_is_random_by_its_key(name):
    config = dataclasses.replace(OFF, **{name: 0.5})
    one, again, other = run(config, 0), run(config, 0), run(config, 1)
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 1e-3
    assert abs(one - run(OFF, 0)).max() > 1e-3


def test_no_two_layers_drop_the_same():
    masks = []

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, nn.Dropout) and not isinstance(out, jax.core.Tracer):
            masks.append(np.asarray(out == 0).tobytes())
        return out

    with nn.intercept_methods(record):
        run(ON, 0)
    assert len(masks) == 1 + 2 * 4  # embeddings; attention, MLP and two sums a layer
    assert len(set(masks)) == len(masks)


def mean_over_keys(module, params, *args):
    keys = jax.random.split(jax.random.key(0), 4000)
    run = jax.vmap(lambda key: module.apply({"params": params}, *args, rngs={"dropout": key}))
    values = np.asarray(jax.jit(run, compiler_options=QUICK)(keys))
    return values.mean(0), 6 * values.std(0) / len(keys) ** 0.5 + 1e-5


class SelfAttention(nn.Module):
    """The output of attention alone."""

    deterministic: bool

    @nn.compact
    def __call__(self, x):
        mask = jnp.tril(jnp.ones((1, 6, 6), bool))
        return Attention(ON, self.deterministic, 1.0)(x, x, mask)[0]


class FeedForward(nn.Module):
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        return MLP(ON, self.deterministic, 1.0)(x)


@pytest.mark.parametrize("module", [SelfAttention, FeedForward])
def test_dropout_keeps_the_mean(module):
    """Outputs are linear in what is dropped: attention weights, and the feed-forward layer's."""
    x = jax.random.normal(jax.random.key(1), (1, 6, 8))
    params = nn.unbox(module(True).init(jax.random.key(2), x)["params"])
    mean, allowed = mean_over_keys(module(False), params, x)
    wanted = module(True).apply({"params": params}, x)
    assert (abs(mean - wanted) < allowed).all()
    assert abs(wanted).max() > 20 * allowed.min()  # so that a factor would be seen
