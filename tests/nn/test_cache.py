"""Decoding with a cache gives what the whole sequence at once gives, teacher-forced."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_configs import (
    DECODERS,
    VOCAB,
    as_tokens,
    batch_for,
    examples,
    logits,
    model_configs,
    random_params,
    random_tokens,
)

from jaxformer.config import ModelConfig
from jaxformer.nn import cache as caches
from jaxformer.nn.transformer import apply, pack, unstack
from jaxformer.types import NOWHERE, Tokens

ROWS, PROMPT, STEPS = 2, 4, 4
LENGTH, SOURCE = PROMPT + STEPS, 5
SOURCES = (3, SOURCE)


@partial(jax.jit, static_argnums=0)
def prefill(config, params, cache, tokens, source):
    """Logits of `tokens`, whose source (if any) is read first, and the cache with them in it."""
    memory = seg = None
    if config.n_encoder_layers:
        memory, seg = apply(config, params, source, method="encode"), source.seg
    params = unstack(params)
    hidden, cache = apply(config, params, tokens, memory, seg, cache, method="decode")
    return apply(config, params, hidden, method="unembed"), cache


@partial(jax.jit, static_argnums=0)
def step(config, params, cache, tokens, parent):
    params = pack(unstack(params))
    cache = caches.follow(cache, parent)
    hidden, cache = apply(config, params, tokens, None, None, cache, method="decode")
    return apply(config, params, hidden, method="unembed"), cache


def assert_same(cached, whole):
    """The same logits, and the same token."""
    np.testing.assert_allclose(cached, whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cached.argmax(-1), whole.argmax(-1))


def right_padded(rows: list[list[int]]) -> Tokens:
    seg = np.array([[i < len(row) for i in range(LENGTH)] for row in rows])
    ids = np.array([row + [0] * (LENGTH - len(row)) for row in rows])
    return as_tokens(ids, np.arange(LENGTH) * seg, seg)


def check(config, seed, width):
    params, rng = random_params(config, seed), np.random.default_rng(seed)
    source = random_tokens(rng, ROWS, SOURCE, SOURCES)
    memory_length = SOURCE if config.n_encoder_layers else 0
    empty = caches.init_cache(config, ROWS, PROMPT + STEPS * width + 1, memory_length)

    # The prompt, then hypotheses that follow random parents.
    lengths = rng.permutation([PROMPT, rng.integers(1, PROMPT)])
    prompt = random_tokens(rng, ROWS, PROMPT, lengths)
    first, cache = prefill(config, params, empty, prompt, source)
    cache = caches.share_prompt(cache, width)
    paths = [[prompt.ids[row, :n].tolist()] * width for row, n in enumerate(lengths)]
    histories, outs = [], []
    for t in range(STEPS):
        ids, parent = (rng.integers(0, n, (ROWS, width)) for n in (VOCAB, width))
        paths = [
            [paths[row][parent[row, w]] + [int(ids[row, w])] for w in range(width)]
            for row in range(ROWS)
        ]
        pos = np.broadcast_to(lengths[:, None] + t, ids.shape)
        queries = as_tokens(ids, pos, np.ones_like(ids))
        out, cache = step(config, params, cache, queries, jnp.array(parent) if width > 1 else None)
        outs.append(np.asarray(out).reshape(ROWS * width, VOCAB))
        histories.extend(path for row in paths for path in row)
    assert int(cache.filled) == PROMPT + STEPS * width

    # A prompt of twice the length in two chunks; in one row the padding may start in the first.
    long = random_tokens(rng, ROWS, LENGTH, [LENGTH, rng.integers(1, LENGTH)])
    left, cache = prefill(config, params, empty, take(long, 0), source)
    right, cache = prefill(config, params, cache, take(long, PROMPT), source)
    chunked = np.concatenate([left, right], axis=1)

    # All of them without a cache.
    target = jax.tree.map(lambda *x: jnp.concatenate(x), right_padded(histories), long)
    repeated = jax.tree.map(
        lambda x: jnp.concatenate([jnp.tile(jnp.repeat(x, width, 0), (STEPS, 1)), x]), source
    )
    whole = np.asarray(logits(config, params, batch_for(config, repeated, target)))
    last = [len(history) - 1 for history in histories]
    assert_same(np.concatenate(outs), whole[np.arange(len(last)), last])
    for row, n in enumerate(lengths):
        assert_same(np.asarray(first)[row, :n], whole[row * width, :n])
    real = np.asarray(long.seg) > 0
    assert_same(chunked[real], whole[len(last) :][real])


def take(tokens: Tokens, at: int) -> Tokens:
    return jax.tree.map(lambda x: x[:, at : at + PROMPT], tokens)


widths = st.integers(1, 3)
seeds = st.integers(0, 2**32 - 1)


@examples(2)
@given(model_configs(DECODERS), seeds, widths)
def test_cached_is_uncached(config, seed, width):
    """Chunks of a prompt, and each hypothesis, see their own history and nothing else."""
    check(config, seed, width)


@pytest.mark.slow
@examples(30)
@given(model_configs(DECODERS, max_layers=3), seeds, widths)
def test_cached_is_uncached_in_many_models(config, seed, width):
    check(config, seed, width)


CONFIG = ModelConfig(
    vocab_size=VOCAB,
    n_encoder_layers=1,
    n_decoder_layers=2,
    d_model=8,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    compute_dtype="bfloat16",
)


def test_an_empty_cache_has_its_shapes():
    cache = caches.init_cache(CONFIG, 3, 7, 5)
    assert [kv.k.shape for kv in cache.own] == [(3, 2, 7, 6)] * 2
    assert [kv.v.shape for kv in cache.cross] == [(3, 2, 5, 6)] * 2
    assert cache.own[0].k.dtype == jnp.bfloat16
    assert (cache.pos == NOWHERE).all() and cache.filled == 0


def test_following_moves_history_but_no_keys():
    cache = caches.init_cache(CONFIG, 1, 6, 5)
    cache = cache._replace(pos=cache.pos.at[0, 0].set(0), filled=jnp.int32(2))
    assert caches.follow(cache, jnp.array([[0]])) is cache  # one hypothesis needs no table
    cache = caches.share_prompt(cache, 2)  # slot 1 is padding
    assert cache.seen is not None
    assert cache.seen[0].astype(int).tolist() == [[1, 0, 0, 0, 0, 0]] * 2
    once = caches.follow(cache, None)
    assert once.seen[0].astype(int).tolist() == [[1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]
    twice = caches.follow(once._replace(filled=jnp.int32(4)), jnp.array([[1, 1]]))
    assert twice.seen[0].astype(int).tolist() == [[1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1]]
    assert twice.own is cache.own
