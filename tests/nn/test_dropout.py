"""Dropout is random by its key, keeps the mean, and is off unless training asks for it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from random_configs import VOCAB, batch_for, random_params, random_tokens

from jaxformer.config import ModelConfig
from jaxformer.nn.attention import Attention
from jaxformer.nn.layers import MLP
from jaxformer.nn.transformer import Transformer

OFF = ModelConfig(vocab_size=VOCAB, n_decoder_layers=2, d_model=8, d_ff=8, n_heads=2, max_length=16)
ON = dataclasses.replace(OFF, dropout=0.4, attention_dropout=0.4, mlp_dropout=0.4)
TOKENS = random_tokens(np.random.default_rng(0), 2, 6)
PARAMS, BATCH = random_params(OFF, 0), batch_for(OFF, TOKENS, TOKENS)


@partial(jax.jit, static_argnums=(0, 1))
def apply(config, deterministic, rngs):
    return Transformer(config, deterministic).apply({"params": PARAMS}, BATCH, rngs=rngs)


def run(config, key, deterministic=False):
    rngs = None if key is None else {"dropout": jax.random.key(key)}
    return apply(config, deterministic, rngs)


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
        if isinstance(context.module, nn.Dropout):
            jax.debug.callback(lambda zero: masks.append(zero.tobytes()), out == 0)
        return out

    with nn.intercept_methods(record):  # a config of its own, which is not compiled yet
        jax.block_until_ready(run(dataclasses.replace(ON, dropout=0.6), 0))
    jax.effects_barrier()
    assert len(masks) == 1 + 2 * 4  # embeddings; attention, MLP and two sums a layer
    assert len(set(masks)) == len(masks)


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

    @jax.jit
    def outputs(x, keys):
        variables = nn.unbox(module(True).init(jax.random.key(2), x))
        dropped = jax.vmap(lambda key: module(False).apply(variables, x, rngs={"dropout": key}))
        return module(True).apply(variables, x), dropped(keys)

    x = np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)
    wanted, dropped = outputs(x, jax.random.split(jax.random.key(0), 4000))
    allowed = 6 * np.std(dropped, axis=0) / 4000**0.5 + 1e-5
    assert (abs(np.mean(dropped, axis=0) - wanted) < allowed).all()
    assert abs(wanted).max() > 20 * allowed.min()  # so that a factor would be seen
